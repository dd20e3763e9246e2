"""What experiments share: windows of text, finished work as JSON, so that none is done twice, and numbers with their spread."""

import json
import math
import os
import statistics

import torch

from configurator import UserError
from data import Split, read_meta, replacing


def windows(folder, split, count, config):
    """
    Inputs and targets of at most count evenly spaced windows of a data set's split, (count, block_size) each, the same for
    all models of one block_size. Raises UserError.
    """
    if (vocab_size := read_meta(folder)["vocab_size"]) > config.vocab_size:
        raise UserError(f"{folder} has a vocabulary of {vocab_size}, the model one of {config.vocab_size}: give its --data_dir")
    text = Split(folder, split, config.block_size)
    return tuple(map(torch.from_numpy, text.windows(text.fixed(count))))


def read(path):
    """The list of records that earlier calls wrote to path; none if there is no file. Raises UserError."""
    if not os.path.exists(path):
        return []
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON of this command ({type(error).__name__}): choose another --out") from None


def write(path, text):
    """Write a text file as a whole, and its folder. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None


def find(records, identity):
    """The record that has all of these items, or None."""
    return next((record for record in records if identity.items() <= record.items()), None)


def mean_sd(values, form=".4f", sd=None):
    """Mean ± standard deviation, which a single value doesn't have. form, sd: how they are written. inf: it diverged."""
    if math.inf in values:
        return "diverged"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{sd or form.lstrip('+')}}"


def markdown(head, rows):
    """A table in Markdown, its first column to the left."""
    return (
        "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] + ["--:"] * (len(head) - 1), *rows)) + "\n"
    )


def made(records):
    """Where and with what all of these records were made, by their made_with() items, as one line."""
    about = {", ".join(f"{k} {r.get(k) or 'unknown'}" for k in ("hardware", "torch", "commit")) for r in records}
    return "; ".join(sorted(about))
