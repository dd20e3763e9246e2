"""
Text -> token shards in data/NAME (the format is data.py's).

    python prepare.py                                                 pydoc: the reference text inside CPython, as bytes
    python prepare.py lis                                             prefix longest increasing subsequences, as bytes
    python prepare.py shakespeare --input ../texts/input.txt          any text files or folders of them
    python prepare.py mine --input a.jsonl.gz --column body           rows of .jsonl, .csv or .parquet files, packed or not
    python prepare.py minipile                                        or tinystories, openwebtext, slimpajama, from Hugging Face
    python prepare.py owner/name --tokenizer gpt2 --source DIR        any other one, here from a local copy

Text files are UTF-8, or have a byte order mark, or --encoding says what they are; <|endoftext|> in them ends a document. The
words train, val, valid, validation, dev and test in the name of a file choose its split, and test stays out.

Worker processes tokenize batches of documents, and this one writes them to disk in their order; memory does not grow with the
corpus, and the shards do not depend on the number of workers. Old data of the same name stays until the new is complete.
"""

import argparse
import ast
import bisect
import codecs
import collections
import contextlib
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
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from data import Writer, get_tokenizer, read_meta
from files import lock, replacing
from guard import DISK, UserError, cli

HUB = dict(
    minipile="JeanKaddour/minipile",
    tinystories="roneneldan/TinyStories",
    openwebtext="Skylion007/openwebtext",
    slimpajama="DKYoon/SlimPajama-6B",  # a sample of 6 billion tokens
)
BATCH = 1 << 20  # characters or bytes of text that a worker gets at once: so many that handing them over costs little
# a word of a file's name, or a hub split's name -> our split; test text is never trained on
SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val", dev="val", eval="val", test="test",
              testing="test")  # fmt: skip
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # files of rows -> datasets' reader
END = "<|endoftext|>"
# the arguments that, beside source and tokenizer, say what text there will be
OPTIONS = ("config", "column", "train", "val", "val_fraction", "encoding", "errors", "raw", "max_tokens", "documents", "seed")

# ----------------------------------------------------------------------------------------------------------------------
# sources: generators of documents or pieces of them, (split, text, whether a document ends here); hub() yields batches of these


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
    yield from held_out(documents, every(args.val_fraction or 0.1))


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

    yield from held_out((line() for _ in range(args.documents)), every(args.val_fraction or 0.05))


def input_files(given):
    """
    {file of --input: its split}: train, val, test, unused, or None if neither its name nor that of a folder below the given
    one has such a word. A given folder stands for its .txt and .md files or, if there are none, its files of rows. Prints the
    choice. Raises UserError for files that are missing, given twice, or all for validation or tests.
    """
    splits = {}
    for path in map(Path, map(os.path.expanduser, given)):
        if str(path) == "." and "." not in given:
            raise UserError("--input has an empty name: is a variable of the shell not set?")
        if not path.exists():
            raise UserError(f"--input {path} does not exist")
        found = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "meta.json"]
            found = [p for p in inside if kind(p) in (".txt", ".md")] or [p for p in inside if kind(p) in TABLES]
        for file in found:
            if file in splits:
                raise UserError(f"--input has {file} more than once: the same text must not be in both splits")
            parts = [file.name, *reversed(file.relative_to(path).parts[:-1])]
            said = [{SPLITS[word] for word in re.findall("[a-z]+", part.lower()) if word in SPLITS} for part in parts]
            splits[file] = next((words.pop() for words in said if len(words) == 1), None)
    if len({path.resolve() for path in splits}) < len(splits):
        raise UserError("--input has a file more than once, by several names: the same text must not be in both splits")
    if len(splits) == 1:  # a single file is divided, whatever its name
        splits = dict.fromkeys(splits)
    if splits and {*splits.values()} <= {"val", "test"}:
        raise UserError("by their names all files of --input are for validation or tests: rename the files to train on")
    if "val" in splits.values():  # then other files are for training, or stay out where one is called train
        splits = {path: split or ("unused" if "train" in splits.values() else "train") for path, split in splits.items()}
    shown = {None: "divided into train and val", "test": "left out: test text is never trained on",
             "unused": "left out: others are named train and val, this one is neither"}  # fmt: skip
    for fate in ("train", "val", None, "test", "unused"):
        paths = [path for path, split in splits.items() if split == fate]
        for path in paths[:20]:
            print(f"{path}: {shown.get(fate, fate)}")
        if len(paths) > 20:
            print(f"and {len(paths) - 20} more files: {shown.get(fate, fate)}")
    return splits


def kind(path):
    """A file's last suffix in lower case, after suffixes of compression such as .gz are dropped."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".bz2", ".xz", ".zst")]
    return suffixes[-1] if suffixes else ""


def text_files(args):
    """
    Text files, or every .txt and .md below a folder. Their names choose their splits. If no file is for validation, the end of
    all training text is held out: the last tenth, or --val_fraction, cut at a line end if possible.
    """
    splits = {path: split for path, split in args.files.items() if split not in ("test", "unused")}
    with tempfile.TemporaryDirectory() as scratch:
        files = {as_utf8(path, args, scratch): (path, split) for path, split in splits.items()}
        sizes = {file: file.stat().st_size for file in files}
        divided = [file for file, (_, split) in files.items() if split is None or "val" not in splits.values()]
        room = (1 - (args.val_fraction or 0.1)) * sum(sizes[file] for file in divided)  # bytes that still are for training
        for file, (path, split) in files.items():
            if file in divided:
                cut = sizes[file] if room >= sizes[file] else cut_near(file, max(int(room), 0))
                parts = [("train", 0, cut), ("val", cut, sizes[file])]
                room -= sizes[file]
            else:
                parts = [(split, 0, sizes[file])]
            for part, start, stop in parts:
                for text, ends in pieces(file, start, stop, path):
                    yield part, text, ends


def as_utf8(path, args, scratch):
    """A file that holds the text of path as UTF-8: path itself or, where it is something else, a copy in the folder scratch."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            marks = dict(utf_32=codecs.BOM_UTF32_LE, utf_32_=codecs.BOM_UTF32_BE, utf_8_sig=codecs.BOM_UTF8,
                         utf_16=codecs.BOM_UTF16_LE, utf_16_=codecs.BOM_UTF16_BE)  # fmt: skip
            marked = next((name.rstrip("_") for name, mark in marks.items() if head.startswith(mark)), "utf-8")
            codec = codecs.lookup(args.encoding or marked)
            if not codec._is_text_encoding:
                raise LookupError
            if codec.name == "utf-8" and head.startswith(codecs.BOM_UTF8):
                codec = codecs.lookup("utf-8-sig")
            if codec.name == "utf-8" and args.errors == "strict" and path.is_file():
                return path
            copy, done, replaced = Path(scratch) / str(len(os.listdir(scratch))), 0, []
            codecs.register_error("counted", lambda error: replaced.append(1) or ("\ufffd", error.end))
            decoder = codec.incrementaldecoder("counted" if args.errors == "replace" else "strict")
            with open(copy, "w", encoding="utf-8", newline="") as out:
                for chunk in itertools.chain([head], iter(lambda: file.read(1 << 20), b""), [b""]):
                    try:
                        out.write(decoder.decode(chunk, final=not chunk))
                    except UnicodeDecodeError as error:
                        raise bad_byte(path, done + len(chunk) - len(error.object) + error.start, error) from None
                    done += len(chunk)
    except LookupError:
        raise UserError(f"Python does not know the text encoding {args.encoding}; try latin-1, cp1252 or utf-16-le") from None
    except UnicodeError as error:
        raise UserError(f"{path}: {error}; give --encoding utf-16-le or utf-16-be") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if replaced:
        print(f"{path}: {len(replaced):,} places that could not be read became \ufffd")
    return copy


def bad_byte(path, position, error):
    """The UserError for a byte at this position of a file."""
    return UserError(
        f"{path} is not {error.encoding} text: byte {error.object[error.start]:#04x} at {position:,} ({error.reason}). If "
        "it is text, give its --encoding, such as latin-1, or take --errors=replace"
    )


def cut_near(path, position):
    """Where the first line at or after position begins or, if none does before the end, the first character."""
    with open(path, "rb") as file:
        file.seek(max(position - 1, 0))
        line = position if position == 0 else position - 1 + len(file.readline())
        if line < file.seek(0, os.SEEK_END):
            return line
        file.seek(position)
        return position + len(re.match(rb"[\x80-\xbf]*", file.read(4))[0])


def pieces(path, start, stop, name=None, size=1 << 14):
    """
    The bytes of a UTF-8 file from start to stop as texts of about `size` bytes, each with whether it is the last. A cut
    comes before a space that follows a printable character: no pattern of tiktoken's matches across it. (The character's last
    byte is printable ASCII or at least 0xb0: no white space ends so.) Raises UserError with name for a byte that is not UTF-8.
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
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise bad_byte(name or path, start + error.start, error) from None
            start += len(block)
            yield text, start == stop


def hub(args):
    """
    Batches of documents: the rows of a Hugging Face data set, of a local copy of one, or of files of rows. It reads the splits
    train and validation, or those of --train and --val. If there is none for validation, it holds out one document in 2,000, or
    the share --val_fraction, and at least one.
    """
    import datasets

    if args.source and not Path(args.source).expanduser().exists():
        raise UserError(f"--source {args.source} does not exist")
    name, files, ours = args.source or HUB.get(args.name, args.name), {}, SPLITS
    if args.input:
        found = {path: split for path, split in args.files.items() if split not in ("test", "unused")}
        for path, split in found.items():
            files.setdefault(split or "train", []).append(str(path))
        if not found:
            return
        kinds = sorted({kind(path) for path in found})
        if len(kinds) > 1:
            raise UserError(f"--input has files of several kinds, {', '.join(kinds)}: prepare them under several names")
        name = TABLES[kinds[0]]
    if args.train or args.val:
        validation = args.val or [split for split, use in SPLITS.items() if use == "val"]
        ours = dict.fromkeys(validation, "val") | dict.fromkeys(args.train or ["train"], "train")
    try:
        data = datasets.load_dataset(os.path.expanduser(name), args.config, data_files=files or None, keep_in_memory=False)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if args.input:
            raise UserError(f"cannot read the rows of {', '.join(args.input)}: {reason}; every line must be one row") from None
        raise UserError(
            f"cannot load the data set {name}: {reason}; connect to the network, give a local copy with --source DIR, or "
            "choose a configuration with --config"
        ) from None
    order = (*args.train, *args.val) if args.train and args.val else data
    used = {split: ours[split] for split in order if split in data and ours.get(split) in ("train", "val")}
    missing = [split for split in (*args.train, *args.val) if split not in data]
    if missing or "train" not in used.values():
        raise UserError(f"{name} has the splits {', '.join(data)}: choose with --train and --val")
    for split in used:
        if data[split].info.builder_name == "text":
            raise UserError(f"{name} holds plain text files, whose lines are no documents: give the folder as --input")
        columns = [c for c, kind in data[split].features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
        if args.column not in columns:
            raise UserError(
                f"{name} has no text column {args.column} in its split {split}; its text columns: {', '.join(columns) or '-'}; "
                "choose with --column"
            )
    rows = sum(len(data[split]) for split in used)
    each = None if "val" in used.values() else min(every(args.val_fraction or 1 / 2000), max(rows, 2))
    if rows == 1 and each:  # the end of the one text is held out
        ((split, _),) = used.items()
        text = data[split][0][args.column] or ""
        cut = int((1 - (args.val_fraction or 0.1)) * len(text))
        yield [("train", text[:cut], True), ("val", text[cut:], True)]
        return
    before = 0  # rows in the files before this one
    for split in used:
        for file in data[split].cache_files:
            column = texts(file["filename"], args.column)
            size = 1 + BATCH * len(column) // max(1, column.nbytes)
            for first in range(0, len(column), size):
                yield Rows(file["filename"], args.column, first, size, before + first, used[split], each)
            before += len(column)


@functools.cache
def texts(path, column):
    """A column of an Arrow file, memory-mapped."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()[column]


@dataclass
class Rows:
    """A batch of documents that a worker reads itself, so that no text goes through a pipe."""

    path: str
    column: str
    first: int
    size: int
    number: int  # the first row's number in its split, from 0; `first` counts in its file
    split: str
    every: int | None  # one document in so many is held out; None: none

    def __iter__(self):
        documents = texts(self.path, self.column).slice(self.first, self.size).to_pylist()
        if self.every:
            return held_out(documents, self.every, self.number)
        return ((self.split, text, True) for text in documents)


def every(fraction):
    """The n, at least 2, for which one document in n is about this fraction of them."""
    return max(2, round(1 / fraction))


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
    """In a worker: ignore Ctrl-C, which the main process handles, and end if that is killed: the queue does not report it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def encode(tokenizer, dtype, marks, batch):
    """
    In a worker: for each split of this batch, its tokens, as dtype, and the counts of its documents, its bytes and its rows
    without text. marks: the text <|endoftext|> becomes the end-of-text token.
    """
    encoding, done = get_tokenizer(tokenizer), collections.defaultdict(lambda: ([], collections.Counter()))
    end = np.array([encoding.eot_token])
    for split, text, ends in batch:
        tokens, count = done[split]
        if text is None:
            count["without text"] += 1
            continue
        if marks and ends and END in text and not text.rpartition(END)[2].strip():
            text = text[: text.rindex(END) + len(END)]  # a line end after the last mark is no document
        ids = encode_text(encoding, text, {END} if marks else set())
        tokens.append(ids)
        marked = np.count_nonzero(ids == encoding.eot_token) if marks else 0
        ends = ends and not (marked and ids[-1] == encoding.eot_token)  # the file's own mark is its end
        if ends:
            tokens.append(end)
        count["held out"] += isinstance(batch, Rows) and batch.every is not None
        count["documents"] += int(marked) + ends
        count["bytes"] += len(text.encode()) - int(marked) * len(END)
    return {split: (np.concatenate([end[:0], *t], dtype=dtype, casting="unsafe"), count) for split, (t, count) in done.items()}


def encode_text(encoding, text, special, size=10_000):
    """The tokens of a text. If tiktoken's patterns fail, as on a million spaces, it takes parts of `size` characters."""
    try:
        return encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except BaseException as error:  # a panic of its Rust code is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError) or len(text) <= size:
            raise
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return np.concatenate([encode_text(encoding, part, special, size) for part in parts])


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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="pydoc (if nothing is given), lis, a hub data set, or a name for --input")
    parser.add_argument("--input", nargs="+", action="extend", metavar="PATH", help="files, or folders of them")
    parser.add_argument("--source", metavar="DIR", help="a local copy of the hub data set, in the hub's layout")
    parser.add_argument("--config", help="the configuration of the hub data set, where it has several")
    parser.add_argument("--column", default="text", help="the column of rows that holds the text")
    parser.add_argument("--train", nargs="+", default=[], metavar="SPLIT", help="hub splits to train on (default: train)")
    parser.add_argument("--val", nargs="+", default=[], metavar="SPLIT", help="hub splits to validate on (default: validation)")
    parser.add_argument("--val_fraction", type=float, help="share to validate on if no split or file is for it (default: 0.1; "
                        "lis 0.05, rows 0.0005)")  # fmt: skip
    parser.add_argument("--encoding", help="of text files (default: UTF-8, or as a byte order mark says)")
    parser.add_argument(
        "--errors", choices=("strict", "replace"), default="strict", help="what to do with bytes that are no text"
    )
    parser.add_argument("--raw", action="store_true", help=f"keep {END} in text files as text")
    parser.add_argument("--max_tokens", type=int, help="end the training split after this many tokens")
    parser.add_argument("--tokenizer", help="bytes or a tiktoken name (default: gpt2 for rows, else bytes)")
    parser.add_argument("--out", metavar="DIR", default="data", help="the folder that NAME/ goes into")
    parser.add_argument("--overwrite", action="store_true", help="replace finished data of the same name made from other text")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    parser.add_argument("--shard_tokens", type=int, default=1 << 26, help="tokens in a shard")
    parser.add_argument("--documents", type=int, default=200_000, help="lines of lis")
    parser.add_argument("--seed", type=int, default=0, help="of lis, and of the order of pydoc's documents")
    args = parser.parse_args(arguments)
    if args.input and not args.name:
        parser.error(f"give the data set a name: prepare.py NAME --input {' '.join(args.input)}")
    args.name = args.name or "pydoc"
    if min(args.workers, args.shard_tokens, args.documents, args.max_tokens or 1) < 1:
        parser.error("--workers, --shard_tokens, --documents and --max_tokens must be at least 1")
    if args.val_fraction is not None and not 0 < args.val_fraction <= 0.5:
        parser.error(f"--val_fraction {args.val_fraction} must be above 0 and at most 0.5")
    if args.source and (args.input or args.name in ("pydoc", "lis")):
        parser.error("--source is a copy of a hub data set: name that, as in minipile --source DIR")
    if Path(args.name).name in ("", ".."):
        parser.error(f"{args.name!r} names no folder below {args.out}")
    if not args.input and not args.source and Path(args.name).is_file():
        parser.error(f"{args.name} is a file: prepare.py NAME --input {args.name}")
    args.out = os.path.expanduser(args.out)
    try:
        prepare(args)
    except BrokenPipeError:
        raise
    except OSError as error:
        advice = "free some space or choose another --out" if error.errno in (None, *DISK) else "choose another --out"
        raise UserError(f"cannot prepare {args.name}: {error}; {advice}") from None
    except BrokenProcessPool:
        raise UserError(
            f"cannot prepare {args.name}: a worker was killed, perhaps because memory ran out: take fewer --workers"
        ) from None


def clear(folder, lock=False):
    """Delete what prepare writes into a folder, meta.json first; with lock, also the lock, and the folder if now empty."""
    ours = re.compile(r"(meta\.json|(train|val)_\d{3,}\.npy)(\.tmp)?" + "|lock" * lock)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and ours.fullmatch(path.name)):
        path.unlink()
    if lock:
        with contextlib.suppress(OSError):
            folder.rmdir()


def finished(folder):
    """The meta.json of the finished data in a folder; None if there is none."""
    try:
        return read_meta(folder)
    except UserError:
        return None


def prepare(args):
    """Write the shards and then meta.json into a folder beside the old data, and then move them into its place."""
    started, args.files = time.time(), input_files(args.input) if args.input else {}
    rows = {kind(path) in TABLES for path in args.files}
    if len(rows) > 1:
        raise UserError("--input has text files and files of rows: prepare them under two names")
    source = text_files if rows == {False} else hub if rows or args.input else dict(pydoc=pydoc, lis=lis).get(args.name, hub)
    tokenizer = args.tokenizer or ("gpt2" if source is hub else "bytes")
    encoding = get_tokenizer(tokenizer)
    dtype = np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32
    folder = Path(os.path.realpath(Path(args.out) / Path(args.name).name))  # which may be a link to another disk
    made_of = dict(source=args.source or args.input or HUB.get(args.name, args.name), tokenizer=tokenizer)
    made_of["options"] = {name: getattr(args, name) for name in OPTIONS}
    there = finished(folder)
    if there and not args.overwrite:
        then, now = (about | about.get("options", {}) for about in (there, made_of))
        if differs := [f"{k}={then[k]}, not {v}" for k, v in now.items() if k != "options" and then.get(k, v) != v]:
            raise UserError(f"{folder} has {'; '.join(differs)}: choose another name, or replace it with --overwrite")
    work = hub(args) if source is hub else batches(source(args))
    first = next(work, None)  # a source that cannot be read or is empty fails here, before any work
    if not first:
        raise UserError(f"there is no text in {args.name}: give files, or folders of .txt, .md, .jsonl, .csv or .parquet")
    partial = Path(f"{folder}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial, "wait for its end, or choose another name"):
        clear(partial)  # delete what a killed run left
        try:
            meta = write_shards(args, tokenizer, encoding, dtype, partial, itertools.chain([first], work), source is text_files)
            meta |= dict(name=args.name) | made_of
            with replacing(partial / "meta.json") as file:
                file.write(json.dumps(meta, indent=1).encode())
            folder.mkdir(exist_ok=True)
        except BaseException:
            clear(partial, lock=True)
            raise
        # from here on there is no way back: Ctrl-C waits, and a file that cannot be moved stays where it is
        interrupted = []  # not by a mask: another thread would take the signal
        handler = signal.getsignal(signal.SIGINT)
        if handler is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda *arguments: interrupted.append(arguments))
        try:
            clear(folder)
            for shard in (shard["file"] for shards in meta["shards"].values() for shard in shards):
                os.rename(partial / shard, folder / shard)
            os.rename(partial / "meta.json", folder / "meta.json")
            clear(partial, lock=True)
        finally:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    seconds = time.time() - started
    for split, shards in meta["shards"].items():
        tokens = sum(shard["tokens"] for shard in shards)
        print(f"{split}: {meta['documents'][split]:,} documents, {tokens:,} tokens, {len(shards)} shard(s)")
    if missing := sum(meta["without text"].values()):
        print(f"{missing:,} rows without text were left out")
    size = sum(meta["bytes"].values())
    print(f"{folder}: {size / 1e6:.1f} MB of text in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")
    if interrupted:
        raise KeyboardInterrupt


def write_shards(args, tokenizer, encoding, dtype, folder, work, marks):
    """Tokenize the batches of work and write them to folder. Returns what meta.json says of them."""
    writers = {split: Writer(folder, split, dtype, args.shard_tokens) for split in ("train", "val")}
    counts = {split: collections.Counter() for split in writers}
    room = args.max_tokens or float("inf")  # tokens that the training split still takes

    def wanted():  # when the training split is full, only what is for validation
        return (batch for batch in work if room > 0 or (batch.split == "val" if isinstance(batch, Rows) else True))

    context = multiprocessing.get_context("spawn")  # fork would copy the threads that read hub data
    ahead = 16 * args.workers  # enough to tokenize while a shard is written; 16 MB of text per worker
    progress = tqdm(unit="B", unit_scale=True, desc=args.name, disable=None)
    with progress, ProcessPoolExecutor(args.workers, context, start_worker) as pool:
        for done in in_order(pool, functools.partial(encode, tokenizer, dtype, marks and not args.raw), wanted(), ahead):
            full = room <= 0
            for split, (tokens, count) in done.items():
                if full and (split == "train" or count["held out"]):  # otherwise val would depend on how many batches are ahead
                    continue
                if split == "train":
                    if len(tokens) > room:
                        tokens = tokens[:room]
                        text = encoding.decode_bytes(tokens[tokens != encoding.eot_token].tolist())
                        count["documents"] = int(np.count_nonzero(tokens == encoding.eot_token))
                        count["bytes"] = len(text)
                    room -= len(tokens)
                writers[split].add(tokens)
                counts[split] += count
                progress.update(count["bytes"])
    for split, writer in writers.items():
        writer.flush()
        if not writer.shards:
            raise UserError(f"the {split} split of {args.name} is empty: give more text, or another --val_fraction")
    return dict(
        tokenizer=tokenizer,
        vocab_size=encoding.n_vocab,
        end_of_text=encoding.eot_token,
        dtype=np.dtype(dtype).name,
        **{key: {split: counts[split][key] for split in writers} for key in ("documents", "bytes", "without text")},
        shards={split: writer.shards for split, writer in writers.items()},
        versions=dict(python=platform.python_version(), numpy=np.__version__, tiktoken=tiktoken.__version__),
    )


if __name__ == "__main__":
    cli(main)
