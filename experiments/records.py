"""What experiments share: windows of text, finished work as JSON, so that none is done twice, and numbers with their spread."""

import json
import math
import os
import statistics

import torch

from data import Split, read_meta
from files import replacing
from guard import UserError


def windows(folder, split, count, config):
    """
    Inputs and targets of at most count evenly spaced windows of a data set's split, (count, block_size) each, the same for
    all models of one block_size. Raises UserError.
    """
    if (vocab_size := read_meta(folder)["vocab_size"]) > config.vocab_size:
        raise UserError(f"{folder} has a vocabulary of {vocab_size}, the model one of {config.vocab_size}: change --data_dir")
    text = Split(folder, split, config.block_size)
    return tuple(map(torch.from_numpy, text.windows(text.fixed(count))))


class Records:
    """A list of finished work, dicts, kept as JSON at path. Raises UserError if there is a file that is no such list."""

    def __init__(self, path):
        self.path, self.all = path, []
        if os.path.exists(path):
            try:
                with open(path) as file:
                    self.all = json.load(file)
                if not isinstance(self.all, list):
                    raise ValueError
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} is not a JSON of this command ({type(error).__name__}): choose another --out"
                ) from None

    def find(self, identity):
        """The record that has all of these items, or None."""
        return next((record for record in self.all if identity.items() <= record.items()), None)

    def add(self, record):
        """Keep a record. Raises UserError if the file cannot be written."""
        self.all.append(record)
        self.save()
        return record

    def save(self):
        """Write the file; call this after changing a record. Raises UserError."""
        write(self.path, "[\n" + ",\n".join(map(json.dumps, self.all)) + "\n]\n")  # one line for each record

    def find_or(self, identity, compute):
        """The record that has all of these items or, if there is none, a new one of them and of what compute() returns."""
        return self.find(identity) or self.add(identity | compute())


def write(path, text):
    """Write a text file, whole or not at all, and make its folder. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None


def mean_sd(values, form=".4f", sd=None):
    """Mean ± standard deviation, which a single value doesn't have. form, sd: their formats. A value of inf: diverged."""
    if math.inf in values:
        return "diverged"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{sd or form.lstrip('+')}}"


def markdown(head, rows, left=1):
    """A table in Markdown, its first `left` columns aligned to the left."""
    line = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, line, *rows)) + "\n"


def made(records):
    """The hardware, torch and commit of all these records, by their made_with() items, as one line."""
    about = {", ".join(f"{k} {r.get(k) or 'unknown'}" for k in ("hardware", "torch", "commit")) for r in records}
    return "; ".join(sorted(about))
