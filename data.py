"""
The shard format: tokenized text on disk, and the order in which training reads it.

A folder data/NAME holds train_000.npy, train_001.npy, ..., val_000.npy, ... and meta.json. A shard is a flat array of
token ids, uint16 when the vocabulary fits and uint32 otherwise, and every document in it ends with the end-of-text
token. meta.json is written last, so a folder without it is unfinished.
"""

import functools
import hashlib
import json
import os
import random

import numpy as np
import tiktoken

from files import replacing, sha256
from guard import UserError

SHARD = dict(file=str, tokens=int, sha256=str)  # what meta.json says of a shard
# the version of the order in which Split draws training windows; version 1 never read a text's end, version 2 kept a table of
# each epoch's order
ORDER = 3
SAMPLE = 1 << 28  # bytes of shards that are read through before a run


@functools.cache
def get_tokenizer(name):
    """
    "bytes" (256 bytes and end-of-text, nothing to download) or any name that tiktoken knows, as a tiktoken.Encoding.
    Raises UserError for an unknown name, or for one that is not cached and cannot be downloaded.
    """
    if name == "bytes":
        singles = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(name, pat_str=r"(?s).{1,32}", mergeable_ranks=singles, special_tokens={"<|endoftext|>": 256})
    if name not in (known := tiktoken.list_encoding_names()):
        raise UserError(f"tokenizer {name!r} is none of bytes, {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(
            f"tokenizer {name} is not cached and cannot be downloaded ({type(error).__name__}): connect to the network "
            "once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or take --tokenizer bytes"
        ) from None


class Writer:
    """Collects the tokens of one split and writes a shard whenever shard_tokens are there."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.buffer, self.used, self.shards = np.empty(shard_tokens, dtype), 0, []

    def add(self, tokens):
        while len(tokens):
            n = min(len(tokens), self.shard_tokens - self.used)
            self.buffer[self.used : self.used + n] = tokens[:n]
            self.used, tokens = self.used + n, tokens[n:]
            if self.used == self.shard_tokens:
                self.flush()

    def flush(self):
        """Write what is left, if anything, as the last shard."""
        if self.used:
            name, tokens = f"{self.split}_{len(self.shards):03d}.npy", self.buffer[: self.used]
            with replacing(os.path.join(self.folder, name)) as file:
                np.save(file, tokens)
            self.shards.append(dict(file=name, tokens=self.used, sha256=sha256(os.path.join(self.folder, name))))
            self.used = 0


def read_meta(folder):
    """The folder's meta.json as a dict. Raises UserError if there is none, or none that prepare.py wrote."""
    path, name = os.path.join(folder, "meta.json"), os.path.basename(folder)
    try:
        with open(path) as file:
            meta = json.load(file)
        kinds = [(meta[key], str) for key in ("tokenizer", "dtype")] + [(meta["vocab_size"], int)]
        for split in ("train", "val"):
            kinds += [(meta["bytes"][split], int)]
            kinds += [(shard[key], kind) for shard in meta["shards"][split] for key, kind in SHARD.items()]
        sound = all(type(value) is kind and (kind is str or value > 0) for value, kind in kinds)
    except OSError:
        raise UserError(
            f"no finished data set in {folder}: run python prepare.py {name}, for text of your own with --input or --source"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not what prepare.py writes: run python prepare.py {name} again")
    return meta


def verify(folder, whole=False):
    """
    The folder's meta.json, after these checks: every shard is there with the stated dtype and length; its sha256 agrees and no
    token lies beyond the vocabulary. It makes the last two for all shards if whole, otherwise for some, drawn at random, until
    it has read SAMPLE bytes. Raises UserError naming the file.
    """
    meta, looked_at = read_meta(folder), 0
    shards = [shard for split in ("train", "val") for shard in meta["shards"][split]]
    for shard in random.Random().sample(shards, len(shards)):
        path = os.path.join(folder, shard["file"])
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
            found = f"{tokens.dtype} of shape {tokens.shape}"
        except Exception as error:  # bytes that are no array can make numpy raise anything
            found = f"no array of tokens ({type(error).__name__})"
        stated = f"{meta['dtype']} of shape {(shard['tokens'],)}"
        if found == stated and (whole or looked_at < SAMPLE):
            looked_at += tokens.nbytes
            if sha256(path) != shard["sha256"]:
                found, stated = "other bytes than prepare.py wrote", f"sha256 {shard['sha256'][:12]}"
            elif tokens.max() >= meta["vocab_size"]:
                found, stated = f"a token {tokens.max()}", f"vocab_size {meta['vocab_size']}"
        if found != stated:
            raise UserError(f"{path} holds {found}, meta.json states {stated}: prepare {os.path.basename(folder)} again")
    return meta


def fingerprint(meta):
    """A short text that differs between data sets whose tokens differ."""
    hashes = [[shard["sha256"] for shard in meta["shards"][split]] for split in ("train", "val")]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def shuffled(i, n, key):
    """
    The i-th of the numbers below n in a random order; key (bytes) selects the order. It needs no table: a Feistel network
    [Luby and Rackoff, 1988] permutes all numbers of 2 * half bits; it runs again on a result that is not below n.
    """
    half = max(4, (n.bit_length() + 1) // 2)  # bits of a half; with fewer than 4, some orders would never come
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for r in range(4):
            digest = hashlib.blake2b(right.to_bytes(8), key=key, salt=bytes([r]), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest) & (1 << half) - 1
        i = left << half | right
        if i < n:
            return i


class Split:
    """
    One split of a data set, memory-mapped, read as windows of block_size + 1 tokens: inputs and, one further, targets.

    The training order is a pure function of the seed. Sample i belongs to epoch i // n; each epoch cuts the text at a
    fresh offset into n windows that don't overlap and visits them in a fresh permutation. Every offset that leaves room for
    the windows comes up, so every token is read in some epoch. Nothing is carried from call to call, so a resumed run reads
    on where it stopped, whatever the number of processes.
    """

    def __init__(self, folder, split, block_size, seed=0):
        shards = read_meta(folder)["shards"][split]
        self.shards = [np.load(os.path.join(folder, shard["file"]), mmap_mode="r") for shard in shards]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.block_size, self.seed, self.epoch = block_size, seed, None
        if len(self) < block_size + 1:
            raise UserError(
                f"{folder}: the {split} split has {len(self)} tokens, a window needs block_size + 1 = {block_size + 1}: "
                "prepare more text or lower block_size"
            )

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, n):
        """n tokens from start on, across shards."""
        first, last = np.searchsorted(self.starts, [start, start + n - 1], side="right") - 1
        parts = [self.shards[s][max(start - self.starts[s], 0) : start + n - self.starts[s]] for s in range(first, last + 1)]
        return np.concatenate(parts)

    def windows(self, starts):
        """inputs, targets: int64, (len(starts), block_size)."""
        rows = np.stack([self.read(start, self.block_size + 1) for start in starts]).astype(np.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()  # each in one piece, as pinned memory has to be

    def batch(self, samples):
        """The training windows with these numbers in the endless order."""
        return self.windows([self.start(i) for i in samples])

    def start(self, i):
        n = max(1, (len(self) - 1) // self.block_size - 1)  # one less than fit, to leave room for the offset
        epoch, i = divmod(i, n)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.offset, self.key = epoch, int(rng.integers(len(self) - n * self.block_size)), rng.bytes(16)
        return self.offset + shuffled(i, n, self.key) * self.block_size

    def fixed(self, count):
        """Starts of at most count evenly spaced windows that don't overlap: the same ones at every evaluation."""
        n = (len(self) - 1) // self.block_size
        count = min(count, n)
        return [i * n // count * self.block_size for i in range(count)]
