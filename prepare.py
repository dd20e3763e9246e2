"""
Text -> token shards in data/NAME (the format is data.py's).

    python prepare.py                                                 pydoc: the reference text inside CPython, as bytes
    python prepare.py lis                                             prefix longest increasing subsequences, as bytes
    python prepare.py shakespeare --input ../texts/input.txt          any text files or folders of them
    python prepare.py minipile                                        a hub data set: minipile, tinystories, openwebtext
    python prepare.py owner/name --tokenizer gpt2 --source DIR        any other one, here from a local copy

Worker processes tokenize batches of documents, and this one writes them to disk in their order; memory does not grow with the
corpus, and the shards do not depend on the number of workers.
"""

import argparse
import ast
import bisect
import collections
import functools
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import sysconfig
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from data import Writer, get_tokenizer
from files import replacing
from guard import UserError, cli

HUB = dict(minipile="JeanKaddour/minipile", tinystories="roneneldan/TinyStories", openwebtext="Skylion007/openwebtext")
BATCH = 1 << 20  # characters or bytes of text that a worker has at once: enough that the way to it is little
SPLITS = dict(train="train", val="val", valid="val", validation="val")  # a file's or a hub split's name -> ours

# ----------------------------------------------------------------------------------------------------------------------
# sources: generators of documents or pieces of them, (split, text, whether a document ends here); hub() of batches of these


def pydoc(args):
    """The English reference text in every CPython: the help topics of pydoc and the standard library's docstrings."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    documents = [topics[name] for name in sorted(topics)]
    for path in sorted(p for p in library.rglob("*.py") if not skip & set(p.relative_to(library).parts)):
        try:
            nodes = ast.walk(ast.parse(path.read_bytes()))
        except SyntaxError:  # templates and samples of wrong code
            continue
        scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in nodes if isinstance(node, scopes)]
        if text := "\n\n".join(filter(None, docstrings)):
            documents.append(f"{path.relative_to(library)}\n\n{text}\n".encode(errors="replace").decode())
    random.Random(args.seed).shuffle(documents)
    yield from held_out(documents, every=10)


def lis(args):
    """args.documents lines such as '3 1 4 1 5 9 = 1 1 2 2 3 4': digits, and the length of the longest strictly
    increasing subsequence of every prefix."""
    rng = random.Random(args.seed)

    def line():
        tails, lengths, digits = [], [], rng.choices(range(10), k=rng.randint(4, 20))
        for digit in digits:
            i = bisect.bisect_left(tails, digit)
            tails[i : i + 1] = [digit]
            lengths.append(len(tails))
        return " ".join(map(str, digits)) + " = " + " ".join(map(str, lengths)) + "\n"

    yield from held_out((line() for _ in range(args.documents)), every=20)


def text_files(args):
    """
    Text files, or every .txt and .md below a folder. Files called train and val, valid or validation are those splits
    and others are left out; otherwise the last tenth of all text is held out.
    """
    paths = []
    for path in map(Path, args.input):
        if not path.exists():
            raise UserError(f"--input {path} does not exist")
        paths += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
    named = {path: SPLITS[path.stem] for path in paths if path.stem in SPLITS}
    sizes = {path: path.stat().st_size for path in paths}
    room = 0.9 * sum(sizes.values())  # bytes that still go to the training split
    for path in paths:
        if set(named.values()) == {"train", "val"}:
            parts = [(named[path], 0, sizes[path])] if path in named else []
        else:
            cut = line_end(path, int(min(max(room, 0), sizes[path])))
            parts = [("train", 0, cut), ("val", cut, sizes[path])]
            room -= sizes[path]
        for split, start, stop in parts:
            for text, ends in pieces(path, start, stop):
                yield split, text, ends


def line_end(path, position):
    """The first byte of a line at or after position."""
    with open(path, "rb") as file:
        file.seek(max(position - 1, 0))
        return position if position == 0 else position - 1 + len(file.readline())


def pieces(path, start, stop, size=1 << 14):
    """
    The bytes of a file from start to stop as texts of about `size` bytes, each with whether it is the last. Cuts come
    before a space that follows a printable character (its last byte is ASCII, or one in which no white space ends):
    no pattern of tiktoken's reaches across.
    """
    with open(path, "rb") as file:
        while start < stop:
            file.seek(start)
            block = file.read(min(size, stop - start))
            while start + len(block) < stop:
                if cut := re.match(rb"(.*[!-~\xb0-\xbf]) ", block, re.DOTALL):
                    block = cut[1]
                    break
                block += file.read(min(len(block), stop - start - len(block)))  # doubling: linear time
            start += len(block)
            yield block.decode(errors="replace"), start == stop


def hub(args):
    """
    Batches of documents of a data set of the hub, or of a local copy of one: its splits train and validation, or one document
    in 2,000 held out.
    """
    if args.source and not Path(args.source).exists():
        raise UserError(f"--source {args.source} does not exist")
    import datasets

    name = args.source or HUB.get(args.name, args.name)
    try:
        data = datasets.load_dataset(name, args.config, keep_in_memory=False)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load the data set {name}: {' '.join(str(error).split())}; connect to the network, "
            "give a local copy with --source DIR, or choose a configuration with --config"
        ) from None
    if "text" not in data.column_names.get("train", ()):
        raise UserError(f"{name} has no split train with a column text, only {data.column_names}")
    has_val = any(SPLITS.get(split) == "val" for split in data)
    for split in [split for split in data if split in SPLITS]:
        before = 0  # rows in the files before this one
        for file in data[split].cache_files:
            column = texts(file["filename"])
            size = 1 + BATCH * len(column) // max(1, column.nbytes)
            for first in range(0, len(column), size):
                yield Rows(file["filename"], first, size, before + first, SPLITS[split] if has_val else None)
            before += len(column)


@functools.cache
def texts(path):
    """The column text of an Arrow file, memory-mapped."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()["text"]


@dataclass
class Rows:
    """A batch of documents that a worker reads itself, so that no text goes through a pipe."""

    path: str
    first: int
    size: int
    number: int  # of the first in its split
    split: str | None  # None: one document in 2,000 is held out

    def __iter__(self):
        documents = texts(self.path).slice(self.first, self.size).to_pylist()
        if self.split is None:
            return held_out(documents, 2000, self.number)
        return ((self.split, text, True) for text in documents)


def held_out(documents, every, start=0):
    """One document in `every` goes to the validation split."""
    for i, document in enumerate(documents, start):
        yield "val" if i % every == every - 1 else "train", document, True


# ----------------------------------------------------------------------------------------------------------------------
# text -> tokens -> shards


def batches(documents):
    """Lists of documents, of at least BATCH characters together; the last may be shorter, or empty."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch


def start_worker():
    """In a worker: leave Ctrl-C to the process that feeds it, and end when that is killed, which its queue does not tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode(tokenizer, dtype, batch):
    """In a worker: for each split its tokens, as dtype, and its documents and bytes in this batch."""
    encoding, done = get_tokenizer(tokenizer), collections.defaultdict(lambda: ([], collections.Counter()))
    end = np.array([encoding.eot_token])
    for split, text, ends in batch:
        tokens, count = done[split]
        tokens.append(encoding.encode_to_numpy(text, disallowed_special=()))
        if ends:
            tokens.append(end)
        count["documents"] += ends
        count["bytes"] += len(text.encode())
    return {split: (np.concatenate(tokens, dtype=dtype, casting="unsafe"), count) for split, (tokens, count) in done.items()}


def in_order(pool, function, items, ahead):
    """map() over a pool that holds at most `ahead` items at a time, so that memory stays flat."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; python prepare.py --help lists what there is")


def main(arguments):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="pydoc", help="pydoc, lis, a hub data set, or a name for --input")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="text files, or folders of .txt and .md files")
    parser.add_argument("--source", metavar="DIR", help="a local copy of the hub data set, in the hub's layout")
    parser.add_argument("--config", help="the configuration of the hub data set, where it has several")
    parser.add_argument("--tokenizer", help="bytes or a tiktoken name (default: gpt2 for hub data sets, else bytes)")
    parser.add_argument("--out", metavar="DIR", default="data", help="the folder that NAME/ goes into")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    parser.add_argument("--shard_tokens", type=int, default=1 << 26, help="tokens in a shard")
    parser.add_argument("--documents", type=int, default=200_000, help="lines of lis")
    parser.add_argument("--seed", type=int, default=0, help="of lis, and of the order of pydoc's documents")
    args = parser.parse_args(arguments)
    if min(args.workers, args.shard_tokens, args.documents) < 1:
        parser.error("--workers, --shard_tokens and --documents must be at least 1")
    if args.source and (args.input or args.name in ("pydoc", "lis")):
        parser.error("--source is a copy of a hub data set: name that, as in minipile --source DIR")
    if Path(args.name).name in ("", ".."):
        parser.error(f"{args.name!r} names no folder below {args.out}")
    try:
        prepare(args)
    except OSError as error:
        raise UserError(f"cannot prepare {args.name}: {error}; free some space or choose another --out") from None
    except BrokenProcessPool:
        raise UserError(f"cannot prepare {args.name}: a worker was killed, for want of memory? Take fewer --workers") from None


def prepare(args):
    """Write the shards and then meta.json."""
    started = time.time()
    source = text_files if args.input else dict(pydoc=pydoc, lis=lis).get(args.name)
    tokenizer = args.tokenizer or ("bytes" if source else "gpt2")
    encoding = get_tokenizer(tokenizer)
    dtype = np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32
    folder = os.path.join(args.out, Path(args.name).name)
    work = batches(source(args)) if source else hub(args)
    first = next(work, None)  # a source that cannot be read or is empty fails here, before old shards go
    if not first:
        raise UserError(f"there is no text in {args.name}: give some, as .txt or .md where --input is a folder")
    os.makedirs(folder, exist_ok=True)
    for old in Path(folder).glob("meta.json"), Path(folder).glob("*.npy*"):  # meta.json first: from here on unfinished
        for path in old:
            path.unlink()

    writers = {split: Writer(folder, split, dtype, args.shard_tokens) for split in ("train", "val")}
    counts = {split: collections.Counter() for split in writers}
    context = multiprocessing.get_context("spawn")  # fork would copy the threads that read hub data
    ahead = 16 * args.workers  # enough to tokenize while a shard is written; 16 MB of text a worker
    progress = tqdm(unit="B", unit_scale=True, desc=folder, disable=None)
    with progress, ProcessPoolExecutor(args.workers, context, start_worker) as pool:
        for done in in_order(pool, functools.partial(encode, tokenizer, dtype), itertools.chain([first], work), ahead):
            for split, (tokens, count) in done.items():
                writers[split].add(tokens)
                counts[split] += count
                progress.update(count["bytes"])
    for split, writer in writers.items():
        writer.flush()
        if not writer.shards:
            raise UserError(f"the {split} split of {args.name} is empty: give more text")
    meta = dict(
        name=args.name,
        tokenizer=tokenizer,
        vocab_size=encoding.n_vocab,
        end_of_text=encoding.eot_token,
        dtype=np.dtype(dtype).name,
        source=args.source or args.input or HUB.get(args.name, args.name),
        **{key: {split: counts[split][key] for split in writers} for key in ("documents", "bytes")},
        shards={split: writer.shards for split, writer in writers.items()},
        versions=dict(python=platform.python_version(), numpy=np.__version__, tiktoken=tiktoken.__version__),
    )
    with replacing(os.path.join(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())
    seconds = time.time() - started
    for split, writer in writers.items():
        tokens = sum(shard["tokens"] for shard in writer.shards)
        print(f"{split}: {counts[split]['documents']:,} documents, {tokens:,} tokens, {len(writer.shards)} shard(s)")
    size = sum(count["bytes"] for count in counts.values())
    print(f"{folder}: {size / 1e6:.1f} MB of text in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")


if __name__ == "__main__":
    cli(main)
