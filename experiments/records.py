"""What experiments share: windows of text, finished work as JSON, so that none is done twice, and numbers with their spread."""

import contextlib
import json
import math
import os
import statistics
import sys

import torch

from data import Split, fingerprint, read_meta
from files import lock, replacing
from guard import UserError


def text_of(state, data_dir=None):
    """The folder of the text that the run of a checkpoint read, or of its namesake below data_dir. Raises UserError."""
    if "config" not in state:
        raise UserError("the checkpoint does not say what it was trained on: take a checkpoint of train.py")
    return os.path.join(data_dir or state["config"]["data_dir"], state["config"]["dataset"])


def windows(folder, split, count, state):
    """
    Inputs and targets of at most count evenly spaced windows of a data set's split, (count, block_size) each, for the model of
    the checkpoint `state`. They are the same for all models of one block_size. Raises UserError.
    """
    meta, theirs = read_meta(folder), state["tokenizer"]
    if meta["tokenizer"] != theirs:
        raise UserError(f"{folder} has the tokenizer {meta['tokenizer']}, the checkpoint has {theirs}: change --data_dir")
    if meta["vocab_size"] > (size := state["model_config"]["vocab_size"]):
        raise UserError(f"{folder} has a vocabulary of {meta['vocab_size']}, the model one of {size}: change --data_dir")
    if state.get("data") not in (None, fingerprint(meta)):
        print(f"{folder} is not the text that the checkpoint was trained on", file=sys.stderr)
    text = Split(folder, split, state["model_config"]["block_size"])
    return tuple(map(torch.from_numpy, text.windows(text.fixed(count))))


class Records:
    """
    A list of finished work, dicts, kept as JSON at path. Add to it in a with statement, which keeps other processes from
    adding: each writes the whole list. Raises UserError if there is a file that is no such list, or if another process adds.
    """

    def __init__(self, path):
        self.path, self.all, self.held = path, read(path), contextlib.ExitStack()

    def __enter__(self):
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            self.held.enter_context(lock(self.path, "wait for its end, or choose another --out"))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --out") from None
        self.all = read(self.path)  # the other process may have added since
        return self

    def __exit__(self, *error):
        self.held.close()

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


def read(path):
    """The list in the JSON at path; empty if there is none."""
    try:
        with open(path) as file:
            found = json.load(file)
        if not isinstance(found, list):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON of this command ({type(error).__name__}): choose another --out") from None
    return found


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
