"""Text to shards to batches, and the command line: what prepare.py, data.py and configurator.py promise."""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import pytest
import tiktoken
from scipy.stats import chisquare
from tiktoken_ext import openai_public

import prepare
import sample
import train
from configurator import parse
from conftest import ROOT, SHARED, needs
from data import Split, get_tokenizer, read_meta, shuffled
from guard import UserError


def offline(folder, **variables):
    """The environment of a process that reaches no network and keeps its caches in folder."""
    return os.environ | dict(
        HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", PYTHONPATH=str(ROOT),
        HTTPS_PROXY="http://127.0.0.1:9", TIKTOKEN_CACHE_DIR=str(SHARED / "tiktoken_cache"), **variables,
    )  # fmt: skip


def shell(*arguments, cwd, **options):
    """prepare.py as a user runs it."""
    command = [sys.executable, ROOT / "prepare.py", *map(str, arguments)]
    options = dict(env=offline(cwd)) | options
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """prepare.py within this process, with threads for workers; returns the folder that it wrote."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda workers, *spawn: ThreadPoolExecutor(workers))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))

    def run(*arguments):
        prepare.main([*map(str, arguments), f"--out={tmp_path}", "--workers=2"])
        return tmp_path / arguments[0]

    return run


def tokens(folder, split):
    return np.concatenate([np.load(folder / shard["file"]) for shard in read_meta(folder)["shards"][split]])


def documents(folder, split):
    """The texts of a split: its tokens decoded, without the end of text that every document has to have."""
    meta = read_meta(folder)
    encoding, ids = get_tokenizer(meta["tokenizer"]), tokens(folder, split)
    assert ids[-1] == meta["end_of_text"] == encoding.eot_token
    ends = np.flatnonzero(ids == encoding.eot_token)
    return [encoding.decode(part[part != encoding.eot_token].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def hashes(folder):
    return {split: [shard["sha256"] for shard in shards] for split, shards in read_meta(folder)["shards"].items()}


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py: text to shards


def test_the_default_is_a_megabyte_of_text_and_its_meta_is_true(tmp_path):
    """No argument, network or key: pydoc as bytes in ./data, described rightly by meta.json."""
    done = shell(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "pydoc"
    meta = read_meta(folder)
    assert (meta["tokenizer"], meta["vocab_size"], meta["end_of_text"], meta["dtype"]) == ("bytes", 257, 256, "uint16")
    assert sum(meta["bytes"].values()) >= 1_000_000
    for split, shards in meta["shards"].items():
        texts = documents(folder, split)
        assert len(texts) == meta["documents"][split]
        assert sum(len(text.encode()) for text in texts) == meta["bytes"][split]
        for shard in shards:
            array = np.load(folder / shard["file"])
            assert (array.dtype, len(array)) == (meta["dtype"], shard["tokens"])
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_shards_depend_on_nothing_but_text_and_size(tmp_path):
    """
    1 or 2 workers and a second run give identical files, the documents in the source's order; smaller shards hold the same
    tokens, and are replaced.
    """
    one, two = (tmp_path / out / "lis" for out in ("one", "two"))
    for arguments in ("--out=one --workers=1", "--out=two --workers=2 --shard_tokens=100000", "--out=two --workers=2"):
        done = shell("lis", "--documents=60000", *arguments.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        if "--shard_tokens=100000" in arguments:
            lengths = [shard["tokens"] for shard in read_meta(two)["shards"]["train"]]
            assert len(lengths) > 3 and set(lengths[:-1]) == {100_000}
            for split in ("train", "val"):
                np.testing.assert_array_equal(tokens(one, split), tokens(two, split))
    assert sum(read_meta(one)["bytes"].values()) > 2 << 20  # several batches
    source = list(prepare.lis(argparse.Namespace(seed=0, documents=60_000, val_fraction=None)))
    for split in ("train", "val"):
        assert documents(one, split) == [text for its, text, _ in source if its == split]
    assert hashes(one) == hashes(two)
    assert sorted(os.listdir(one)) == sorted(os.listdir(two)) == ["meta.json", "train_000.npy", "val_000.npy"]


def test_work_comes_back_in_order_and_little_of_it_is_held():
    """The pool's first task is its slowest, and no more than `ahead` items are ever under way."""
    taken = []
    items = (taken.append(i) or i for i in range(20))
    with ThreadPoolExecutor(4) as pool:
        for n, i in enumerate(prepare.in_order(pool, lambda i: time.sleep(0.02 / (1 + i)) or i, items, ahead=8)):
            assert n == i and len(taken) - n <= 8
    assert n == 19


def test_lis_lines_are_right(here):
    """The lengths, against the quadratic recurrence over the digits before each one."""
    folder = here("lis", "--documents=2000")
    lines = documents(folder, "train") + documents(folder, "val")
    assert len(lines) == 2000
    for line in lines:
        digits, lengths = ([int(n) for n in half.split()] for half in line.split("="))
        ending_at = []
        for i, digit in enumerate(digits):
            ending_at.append(1 + max((ending_at[j] for j in range(i) if digits[j] < digit), default=0))
        assert lengths == [max(ending_at[: i + 1]) for i in range(len(digits))], line


def test_files_named_after_splits_choose_them(here, tmp_path):
    """train and valid files anywhere in a folder become the splits, byte for byte; other files stay out."""
    train, val = "Ünï <|endoftext|> \r\n\n\t日本語 🙂 ends without a newline", "\n\nheld out\n"  # with --raw
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for path, text in {"deep/train.txt": train, "valid.md": val, "notes.txt": "no", "train.csv": "no"}.items():
        (tmp_path / "texts" / path).write_bytes(text.encode())
    folder = here("mine", "--raw", "--input", tmp_path / "texts")
    assert (documents(folder, "train"), documents(folder, "val")) == ([train], [val])


def test_test_text_is_never_trained_on(here, tmp_path, capsys):
    """The words of a file's name choose its split, and prepare.py says what became of each file."""
    names = {"a.train.txt": "train", "VALID-b.txt": "val", "my_test.md": "test", "latest.txt": "neither"}
    for name, text in names.items():
        (tmp_path / name).write_text(f"{text} text\n" * 9)
    for split in ("training", "dev", "test"):
        (tmp_path / "parts" / split).mkdir(parents=True)
        (tmp_path / "parts" / split / "part0.txt").write_text(f"{split} text\n" * 9)
    folder = here("folders", "--input", tmp_path / "parts")
    assert (documents(folder, "train"), documents(folder, "val")) == (["training text\n" * 9], ["dev text\n" * 9])
    folder = here("alone", "--input", tmp_path / "my_test.md")  # the only file there is
    assert documents(folder, "train")[0].startswith("test text")
    with pytest.raises(UserError, match="all files of --input are for validation or tests"):
        here("none", "--input", tmp_path / "my_test.md", tmp_path / "VALID-b.txt")
    folder = here("mine", "--input", *(tmp_path / name for name in names))
    assert (documents(folder, "train"), documents(folder, "val")) == (["train text\n" * 9], ["val text\n" * 9])
    out = capsys.readouterr().out
    for name, became in (
        ("a.train.txt", "train"),
        ("VALID-b.txt", "val"),
        ("my_test.md", "left out"),
        ("latest.txt", "left out"),
    ):
        assert f"{tmp_path / name}: {became}" in out
    folder = here("other", "--input", tmp_path / "a.train.txt", tmp_path / "my_test.md")
    assert set("".join(documents(folder, "train") + documents(folder, "val")).split()) == {"train", "text"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings(here, tmp_path, encoding):
    """Byte order marks are enough, other encodings need --encoding; the shards are those of UTF-8."""
    text = "Ümlaut é, naïve.\n" * 3000
    (tmp_path / "input.txt").write_bytes(text.encode(encoding))
    asked = ["--encoding", encoding] if encoding in ("latin-1", "utf-16-le") else []
    folder = here("mine", "--input", tmp_path / "input.txt", *asked)
    assert "".join(documents(folder, "train") + documents(folder, "val")) == text


@pytest.mark.parametrize("content, byte, position", [
    ("é".encode("latin-1") + b"a" * 99, "0xe9", "0"), (b"a" * 100_000 + b"\xff" + b"b " * 999, "0xff", "100,000"),
    (b"\x1f\x8b\x08" + bytes(range(256)), "0x8b", "1"),
])  # fmt: skip
def test_what_is_not_utf_8_is_named(here, tmp_path, content, byte, position):
    """With the file, the first bad byte, and the remedy, which works."""
    (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(
        UserError, match=f"input.txt is not utf-8 text: byte {byte} at {position} .*--encoding.*--errors=replace"
    ):
        here("mine", "--input", tmp_path / "input.txt")
    assert not (tmp_path / "mine").exists() and not (tmp_path / "mine.partial").exists()
    folder = here("mine", "--input", tmp_path / "input.txt", "--errors=replace", "--val_fraction=0.4")
    assert "\ufffd" in "".join(documents(folder, "train") + documents(folder, "val"))


def test_end_of_text_in_a_file_ends_a_document(here, tmp_path):
    """As in TinyStories' own files, also behind the last document; --raw keeps it as text."""
    (tmp_path / "stories-train.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    (tmp_path / "stories-valid.txt").write_text("three\n<|endoftext|>\nfour\n")
    folder = here("mine", "--input", tmp_path)
    assert documents(folder, "train") == ["one\n", "\ntwo\n"] and documents(folder, "val") == ["three\n", "\nfour\n"]
    assert read_meta(folder)["documents"] == dict(train=2, val=2)
    assert read_meta(folder)["bytes"] == dict(train=9, val=12)  # the marks are no text: bits per byte would be too low
    folder = here("raw", "--raw", "--input", tmp_path)
    assert documents(folder, "train") == ["one\n<|endoftext|>\ntwo\n<|endoftext|>\n"]


def test_a_validation_split_is_found_without_a_line_end(here, tmp_path):
    """The cut comes inside a line, between characters; --val_fraction says how much is held out."""
    text = "é" * 1000
    (tmp_path / "input.txt").write_text(text)
    for fraction, held in ((None, 100), (0.5, 500)):
        more = [f"--val_fraction={fraction}", "--overwrite"] if fraction else []
        folder = here("mine", "--input", tmp_path / "input.txt", *more)
        (train,), (val,) = documents(folder, "train"), documents(folder, "val")
        assert train + val == text and len(val) == held


@needs("tiktoken_cache")
def test_a_million_spaces(here, tmp_path):
    """Which tiktoken's patterns cannot bear in one piece."""
    text = "a" + " " * 1_000_000 + "b\n" + "c d\n" * 50_000
    (tmp_path / "input.txt").write_text(text)
    folder = here("mine", "--input", tmp_path / "input.txt", "--tokenizer=gpt2")
    assert "".join(documents(folder, "train") + documents(folder, "val")) == text
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in (text, "short")))
    assert documents(here("rows", "--input", rows), "train") == [text]


def test_a_data_set_of_one_row_is_divided(here, tmp_path):
    """Its end is held out, since there is no other row."""
    text = "a word " * 300
    (tmp_path / "one.jsonl").write_text(json.dumps(dict(text=text)))
    folder = here("one", "--input", tmp_path / "one.jsonl", "--tokenizer=bytes")
    (train,), (val,) = documents(folder, "train"), documents(folder, "val")
    assert train + val == text and len(val) == 210


def test_finished_data_is_not_replaced_unasked(here, tmp_path):
    """By other text, or by other options of the same name; the same text and options replace it."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} line\n" * 100)
    folder = here("mine", "--input", tmp_path / "a.txt")
    (folder / "notes").write_text("mine")
    for flags, words in (
        (["b.txt"], "source=.*a.txt.*, not .*b.txt"),
        (["a.txt", "--val_fraction=0.5"], "val_fraction=None, not 0.5"),
    ):
        with pytest.raises(UserError, match=f"{words}.*--overwrite"):
            here("mine", "--input", tmp_path / flags[0], *flags[1:])
    here("mine", "--input", tmp_path / "a.txt")
    here("mine", "--input", tmp_path / "a.txt", "--val_fraction=0.5", "--overwrite")
    assert len(documents(folder, "val")[0]) == 350
    here("mine", "--input", tmp_path / "b.txt", "--overwrite")
    assert "b line" in documents(folder, "val")[0] and (folder / "notes").read_text() == "mine"


def test_only_its_own_files_are_replaced(here, tmp_path):
    """In the folder, which may be a link to another disk, and beside it; Ctrl-C between the moves waits until they are done."""
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to("disk")
    others = [
        tmp_path / "disk" / "vectors.npy",
        tmp_path / "disk" / "train_000.npy.bak",
        tmp_path / "disk.partial" / "thesis.txt",
    ]
    (tmp_path / "disk.partial").mkdir()
    for path in others:
        path.write_text("mine")
    rename, renamed = os.rename, []

    def interrupted(*names):
        renamed.append(names)
        if len(renamed) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        rename(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here("mine", "--input", tmp_path / "a.txt")
    assert documents(tmp_path / "mine", "val") and (tmp_path / "mine").is_symlink()
    assert all(path.read_text() == "mine" for path in others)


@pytest.mark.parametrize("workers", [1, 3])
def test_max_tokens_does_not_depend_on_the_workers(tmp_path, monkeypatch, workers):
    """Of rows, some held out, and of a text with its end held out: --max_tokens tokens, and the same validation split."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda workers, *spawn: ThreadPoolExecutor(workers))
    monkeypatch.setattr(prepare, "BATCH", 2000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=f"row {i:5} " * 20)) + "\n" for i in range(2000)))
    (tmp_path / "b.txt").write_text("".join(f"line {i:5}\n" for i in range(20_000)))
    for name, files in (("rows", ["a.jsonl"]), ("text", ["b.txt"])):
        knobs = ["--tokenizer=bytes", "--max_tokens=30000", f"--workers={workers}", f"--out={tmp_path}", "--val_fraction=0.1"]
        prepare.main([name, "--input", *(str(tmp_path / f) for f in files), *knobs])
        kept = tokens(tmp_path / name, "train")
        meta = read_meta(tmp_path / name)
        assert len(kept) == 30_000 and meta["bytes"]["train"] == np.count_nonzero(kept != 256)
        assert meta["documents"]["train"] == np.count_nonzero(kept == 256)
    assert len(documents(tmp_path / "rows", "val")) == 17 and documents(tmp_path / "text", "val")[0].startswith("line 18000")


def test_rows_of_files(here, tmp_path):
    """JSON lines, packed or not, and tables: a column of them, without the rows that have no text, up to --max_tokens."""
    import gzip

    rows = [dict(id=i, body=None if i == 3 else f"row {i}") for i in range(10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.csv").write_text("id,body\n" + "".join(f"{row['id']},{row['body'] or ''}\n" for row in rows))
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv"):
        folder = here(name[0], "--input", tmp_path / name, "--column=body", "--tokenizer=bytes", "--val_fraction=0.2")
        texts = [[f"row {i}" for i in range(10) if i != 3 and (i % 5 == 4) == held] for held in (False, True)]
        assert [documents(folder, "train"), documents(folder, "val")] == texts
        assert read_meta(folder)["without text"] == dict(train=1, val=0)
    folder = here(
        "few", "--input", tmp_path / "a.jsonl", "--column=body", "--tokenizer=bytes", "--max_tokens=9", "--val_fraction=0.2"
    )
    assert len(tokens(folder, "train")) == 9 and documents(folder, "val") == ["row 4", "row 9"]
    for column, words in (("text", "no text column text in its split train; .* body"), ("id", "no text column id")):
        with pytest.raises(UserError, match=words):
            here("wrong", "--input", tmp_path / "a.jsonl", f"--column={column}", "--tokenizer=bytes")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--input", "{0}/a.txt"], "give the data set a name"),
        (["mine", "--input", "{0}/a.txt", "{0}/a.txt"], "more than once"),
        (["mine", "--input", "{0}/a.txt", "--input", "{0}"], "more than once"),
        (["{0}/a.txt"], "is a file: prepare.py NAME --input"),
        (["mine", "--source", "{0}"], "give the folder as --input"),
        (["mine", "--input", "{0}/broken.txt"], "does not exist"),
        (["mine", "--input", "{0}/empty"], "there is no text in mine"),
        (["mine", "--input", "{0}/a.txt", "--encoding=x"], "text encoding x"),
        (["mine", "--input", "{0}/a.txt", "--encoding=base64"], "text encoding base64"),
        (["mine", "--input", "{0}/a.txt", "--encoding=utf-16"], "utf-16-le or utf-16-be"),
        (["mine", "--input", "{0}/a.txt", "--val_fraction=1"], "at most 0.5"),
        (["mine", "--input", ""], "empty name"),
        (["mine", "--input", "{0}/rows.jsonl"], "every line must be one row"),
        (["mine", "--input", "{0}/a.txt", "{0}/rows.csv"], "under two names"),
        (["mine", "--inp", "{0}/a.txt"], "--help"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(here, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a line\n" * 50)
    (tmp_path / "in" / "folder.txt").mkdir()
    (tmp_path / "in" / "broken.txt").symlink_to("nowhere")
    if "rows" in arguments[-1]:
        (tmp_path / "in" / "rows.csv").write_text("text\na\n")
        (tmp_path / "in" / "rows.jsonl").write_text("no row\n")
    with pytest.raises(UserError, match=words):
        prepare.main([*(a.format(tmp_path / "in") for a in arguments), f"--out={tmp_path}", "--tokenizer=bytes"])


def test_a_folder_holds_more_than_its_texts(here, tmp_path):
    """Suffixes in capitals count; folders with a text's name, broken links and pipes do no harm."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "A.TXT").write_text("a line\n" * 50)
    (tmp_path / "in" / "folder.txt").mkdir()
    (tmp_path / "in" / "broken.txt").symlink_to("nowhere")
    assert (
        sum(len(text) for split in ("train", "val") for text in documents(here("mine", "--input", tmp_path / "in"), split))
        == 350
    )
    done = shell("piped", "--input", "/dev/stdin", "--workers=1", cwd=tmp_path, input="a line\n" * 50)
    assert done.returncode == 0, done.stderr
    assert len(documents(tmp_path / "data" / "piped", "train")[0]) == 315


def test_a_single_file_holds_out_its_last_tenth(here, tmp_path):
    """The cut comes at the first line end behind nine tenths, and nothing is lost."""
    text = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "input.txt").write_text(text)
    folder = here("mine", "--input", tmp_path / "input.txt")
    (train,), (val,) = documents(folder, "train"), documents(folder, "val")
    assert train + val == text
    assert train.endswith("\n") and 0 <= len(train) - 0.9 * len(text) < 10


MIXED = "  \n\n\n    def f():\n\t\tpass" + "x" * 40_000 + "\n" * 500 + " " * 40_000 + "слово\u3000 \u00a0中文。한국 "


@needs("tiktoken_cache")
def test_a_file_in_pieces_gives_the_tokens_of_the_whole(here, tmp_path):
    """Blank lines, many spaces, none at all and other scripts, in a file far longer than a piece."""
    texts = dict(train=MIXED + "It's 1,234 words; and more.\n" * 10_000 + MIXED, val=MIXED.replace(" ", ""))
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    folder = here("mine", "--input", tmp_path / "train.txt", tmp_path / "val.txt", "--tokenizer=gpt2")
    assert len(list(prepare.pieces(tmp_path / "train.txt", 0, len(texts["train"].encode())))) > 10
    for split, text in texts.items():
        expected = get_tokenizer("gpt2").encode(text, disallowed_special=())
        np.testing.assert_array_equal(tokens(folder, split), [*expected, 50256])


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_pieces_are_cut_where_no_token_reaches_across(name, monkeypatch, tmp_path):
    """Words and white space at random, cut often, with tiktoken's own patterns and every pair of bytes merged."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate([bytes([a]) for a in range(256)] + pairs)}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    pattern = getattr(openai_public, name)()["pat_str"]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    text = "".join(random.Random(0).choices("   \n\t\r\u00a0\u3000\u2028aB1!/'é дя中。", k=50_000))
    (tmp_path / "text").write_bytes(text.encode())
    parts = list(prepare.pieces(tmp_path / "text", 0, len(text.encode()), size=16))
    assert len(parts) > 2000 and [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    assert [t for part, _ in parts for t in encoding.encode(part)] == encoding.encode(text)


def test_a_vocabulary_over_65536_is_uint32(here, monkeypatch, tmp_path):
    """A token id that uint16 would wrap comes back from the disk as it was."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 70_000}
    end = {"<|endoftext|>": 70_001}
    large = tiktoken.Encoding("large", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens=end)
    monkeypatch.setattr(prepare, "get_tokenizer", lambda name: large)
    (tmp_path / "input.txt").write_text("ab c\n" * 100)
    folder = here("mine", "--input", tmp_path / "input.txt")
    assert (read_meta(folder)["dtype"], read_meta(folder)["vocab_size"]) == ("uint32", 70_002)
    assert Counter(tokens(folder, "val").tolist()) == {70_000: 10, ord(" "): 10, ord("c"): 10, ord("\n"): 10, 70_001: 1}
    assert 70_000 in Split(folder, "val", 8).windows([0])[0]


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py: data sets of the hub


@needs("tinystories-sample", "tiktoken_cache")
def test_a_local_copy_of_a_hub_data_set(tmp_path):
    """TinyStories' two splits, tokenized by GPT-2's BPE from the cache."""
    done = shell("tinystories", "--source", SHARED / "tinystories-sample", "--workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "tinystories"
    assert read_meta(folder)["tokenizer"] == "gpt2"
    assert read_meta(folder)["documents"] == dict(train=3117, val=400)
    assert [np.count_nonzero(tokens(folder, split) == 50256) for split in ("train", "val")] == [3117, 400]


def parquet(folder, **columns):
    """A data set in the hub's layout with a training split alone."""
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / "train-00000-of-00001.parquet", row_group_size=700)


def test_splits_of_other_names_and_columns_of_other_kinds(here, tmp_path, monkeypatch):
    """Several for training and one for validation, as asked for; a column of lists is no text."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for split in ("sft", "more", "held", "unused"):
        table = pyarrow.table(dict(text=[f"{split} {i}" for i in range(3)], parts=[["a", "b"]] * 3))
        pyarrow.parquet.write_table(table, tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet")
    knobs = ["--source", tmp_path / "copy", "--tokenizer=bytes", "--train", "sft", "more"]
    here("owner/chat", *knobs, "--val", "held")
    assert [t.split()[0] for t in documents(tmp_path / "chat", "train")] == ["sft"] * 3 + ["more"] * 3
    assert [t.split()[0] for t in documents(tmp_path / "chat", "val")] == ["held"] * 3
    here("owner/two", *knobs)  # no split for validation: one document of all is held out
    assert [len(documents(tmp_path / "two", split)) for split in ("train", "val")] == [5, 1]
    (held,) = (tmp_path / "copy" / "data").glob("held*")
    held.rename(held.with_name(held.name.replace("held", "validation")))
    here("owner/three", *knobs)  # --train leaves the usual split for validation where it is
    assert [t.split()[0] for t in documents(tmp_path / "three", "val")] == ["held"] * 3
    with pytest.raises(UserError, match="has the splits .*: choose with --train and --val"):
        here("owner/none", "--source", tmp_path / "copy", "--tokenizer=bytes")
    with pytest.raises(UserError, match="no text column parts in its split .*; its text columns: text; choose with --column"):
        here("owner/lists", *knobs, "--column=parts")


def test_without_a_validation_split_one_document_in_2000_is_held_out(tmp_path):
    """Documents 2,000 and 4,000 of 4,100, and the others for training in their order, over several batches and Arrow files."""
    texts = [f"story {i:4} " * 100 for i in range(1, 4101)]
    assert sum(map(len, texts)) > 4 * prepare.BATCH
    parquet(tmp_path / "copy", text=texts)
    small = "import datasets, prepare, sys; datasets.config.MAX_SHARD_SIZE = '2MB'; prepare.main(sys.argv[1:])"
    command = [sys.executable, "-c", small, "owner/stories/", "--source=copy", "--tokenizer=bytes", "--workers=1"]
    subprocess.run(command, cwd=tmp_path, env=offline(tmp_path), check=True, capture_output=True, timeout=60)
    assert len(list((tmp_path / "hf").rglob("*.arrow"))) > 1
    assert documents(tmp_path / "data" / "stories", "val") == [texts.pop(1999), texts.pop(3998)]
    assert documents(tmp_path / "data" / "stories", "train") == texts


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py: what goes wrong


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("old --source=copy --tokenizer=bytes", ("text column text", "body")),
        ("old --source=nowhere --tokenizer=bytes", ("--source nowhere does not exist",)),
        ("old --input=nowhere", ("--input nowhere does not exist",)),
        ("old --tokenizer=gpt5 --input=copy", ("'gpt5'", "bytes", "cl100k_base")),
        ("old --tokenizer=o200k_base --input=copy", ("TIKTOKEN_CACHE_DIR", "--tokenizer bytes")),
        ("owner/old --tokenizer=bytes", ("owner/old", "network", "--source DIR")),
        ("old --shard_tokens=0 --input=copy", ("--shard_tokens", "at least 1")),
        ("old --inputs=copy", ("--inputs", "--help")),
        ("--source=copy", ("--source", "minipile")),
        ("old --input=copy --tokenizer=bytes", ("text column text", "body")),
        ("old/.. --input=copy", ("'old/..'", "folder below")),
        ("old --out=file --input=file", ("file", "--out")),
    ],
)
def test_errors_are_one_line_and_leave_the_old_data_alone(arguments, says, tmp_path):
    """Standard error says in one line what is wrong, the exit code is 1, and what was in data/old is there still."""
    parquet(tmp_path / "copy", body=["no text"])
    old = {"meta.json": b"{}", "train_000.npy": b"tokens"}
    (tmp_path / "data" / "old").mkdir(parents=True)
    for name, content in old.items():
        (tmp_path / "data" / "old" / name).write_bytes(content)
    (tmp_path / "file").write_text("not a folder")
    done = shell(*arguments.split(), cwd=tmp_path, env=offline(tmp_path) | dict(TIKTOKEN_CACHE_DIR=str(tmp_path)))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and all(part in line for part in says), line
    assert {p.name: p.read_bytes() for p in (tmp_path / "data" / "old").iterdir()} == old


def test_a_killed_run_leaves_the_old_data_and_is_repeated_exactly(here, tmp_path):
    """Killed at its third shard, over an older data set: its worker ends, the old data stays, and a new run replaces it."""
    command = ["lis", "--documents=1000", "--shard_tokens=10000"]
    expected = hashes(here(*command))
    folder = here(*command, "--seed=1", "--overwrite")
    old = hashes(folder)
    assert old != expected
    killing = (
        "import os, prepare, sys; flush = prepare.Writer.flush\n"
        "prepare.Writer.flush = lambda self: flush(self) if len(self.shards) < 2 else os.kill(os.getpid(), 9)\n"
        "prepare.main(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", killing, *command, "--overwrite", "--workers=1", f"--out={tmp_path}"],
        env=offline(tmp_path), capture_output=True, timeout=60,  # a worker that lives on keeps these pipes open
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert hashes(folder) == old and (tmp_path / "lis.partial" / "train_001.npy").exists()
    assert hashes(here(*command, "--overwrite")) == expected and not (tmp_path / "lis.partial").exists()
    assert len(list(folder.glob("train_*.npy"))) == len(expected["train"])


@pytest.mark.parametrize(
    "event, code, says",
    [
        ("prepare.Writer.add = lambda *_: os.killpg(0, 2) or time.sleep(9)", 130, ""),  # Ctrl-C, which all processes get
        (
            "prepare.in_order = lambda pool, *_: pool.submit(os._exit, 1).result()",
            1,
            "error: .* a worker was killed.*--workers\n",
        ),
    ],
)
def test_the_end_of_a_process_is_a_line_at_most(event, code, says, tmp_path):
    """Ctrl-C ends all processes without a word, a worker that is killed with one line."""
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where the tests run in the background
    ending = f"import guard, os, prepare, signal, sys, time; {heard}; {event}; guard.cli(prepare.main)"
    command = [sys.executable, "-c", ending, "lis", "--documents=1000", "--workers=2", f"--out={tmp_path}"]
    done = subprocess.run(command, env=offline(tmp_path), capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == code and re.fullmatch(says, done.stderr), done.stderr


def test_a_full_disk_is_one_line_and_the_old_data_stays(tmp_path):
    """Here files may not grow beyond 10 kB; the data before stays."""
    assert shell("lis", "--documents=100", "--workers=1", cwd=tmp_path).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data" / "lis").iterdir()}
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    done = shell("lis", "--documents=1000", "--workers=1", "--overwrite", cwd=tmp_path, **limit)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "free some space" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "data" / "lis").iterdir()} == before
    assert os.listdir(tmp_path / "data") == ["lis"]


def test_an_empty_split_is_refused(here, tmp_path):
    """Too few lines to hold one out: an error that names the split, and no meta.json."""
    with pytest.raises(UserError, match="val split of lis is empty"):
        here("lis", "--documents=5")
    assert not (tmp_path / "lis" / "meta.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# data.py: shards to batches


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A data set whose tokens are their own positions, 1,003 for training and 100 for validation, in uneven shards."""
    folder, shards = tmp_path_factory.mktemp("counting"), dict(train=[], val=[])
    for split, n in dict(train=1003, val=100).items():
        for part in np.split(np.arange(n, dtype=np.uint16), [3, 7, 8, 50, 90]):
            shards[split].append(dict(file=f"{split}_{len(shards[split]):03d}.npy", tokens=len(part), sha256=""))
            np.save(folder / shards[split][-1]["file"], part)
    meta = dict(tokenizer="bytes", dtype="uint16", vocab_size=1003, bytes=dict(train=1003, val=100), shards=shards)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


BLOCK = 10
EPOCH = 1002 // BLOCK - 1  # windows in an epoch: one less than fit, to leave room for the offset


def test_windows_cross_shards(counting):
    """Every window there is, and targets one token further."""
    starts = np.arange(1003 - BLOCK)
    x, y = Split(counting, "train", BLOCK).windows(starts)
    assert x.dtype == y.dtype == np.int64
    np.testing.assert_array_equal(x, starts[:, None] + np.arange(BLOCK))
    np.testing.assert_array_equal(y, x + 1)


def test_an_epoch_visits_every_window_once(counting):
    """For many seeds: no two inputs overlap, none is left out, and the next epoch differs in order and offset."""
    for seed in range(20):
        split = Split(counting, "train", BLOCK, seed)
        epochs = [split.batch(range(e * EPOCH, (e + 1) * EPOCH))[0][:, 0] for e in range(4)]
        assert all((np.diff(np.sort(starts)) == BLOCK).all() for starts in epochs)
        assert len({tuple(starts - starts.min()) for starts in epochs}) == 4
        assert len({starts.min() for starts in epochs}) > 1


def test_shuffled_is_a_permutation_and_all_are_alike():
    """Of any number of windows, also one beyond 32 bits; and 1,200 keys give each of the 24 orders of four about as often."""
    for n in (1, 2, 3, 16, 17, 84, 256, 257, 5000):
        assert sorted(shuffled(i, n, b"key") for i in range(n)) == [*range(n)]
    n = 3 << 40
    far = [shuffled(i, n, b"key") for i in range(1000)]
    assert len({*far}) == 1000 and max(far) > 0.99 * n and min(far) < 0.01 * n
    orders = Counter(tuple(shuffled(i, 4, k.to_bytes(2)) for i in range(4)) for k in range(1200))
    assert len(orders) == 24 and chisquare([*orders.values()]).pvalue > 1e-3


@pytest.mark.parametrize("block_size", [10, 64, 400, 501, 1000])
def test_every_token_is_read_in_some_epoch(counting, block_size):
    """Also at the end of the text, however much is left over there: as an input, or the last token as a target."""
    split = Split(counting, "train", block_size, seed=1)
    n = max(1, 1002 // block_size - 1)
    x, y = split.batch(range(400 * n))
    assert set(x.flat) | set(y.flat) == set(range(1003))


def test_the_order_is_a_function_of_the_seed(counting):
    """A fresh object that is asked in another sequence returns the same samples; another seed does not."""
    there, back = range(3 * EPOCH), range(3 * EPOCH)[::-1]
    split, fresh, other = (Split(counting, "train", BLOCK, seed) for seed in (1, 1, 2))
    expected = split.batch(there)[0]
    np.testing.assert_array_equal(fresh.batch(back)[0][::-1], expected)
    assert (other.batch(there)[0] != expected).any()


def test_a_step_reads_the_same_samples_on_any_number_of_processes(counting):
    """Micro-batch m of process r is number m * world + r, as in train.py: together they read one and the same step."""
    batch_size, accumulation, steps = 3, 4, 20  # two and a half epochs

    def starts(world):
        """The starts of all processes' windows in each step, sorted."""
        processes = [Split(counting, "train", BLOCK, seed=5) for _ in range(world)]
        rows = []
        for micro_step in range(steps * accumulation // world):
            for rank, split in enumerate(processes):
                first = (micro_step * world + rank) * batch_size
                rows.append(split.batch(range(first, first + batch_size))[0][:, 0])
        return np.sort(np.reshape(rows, (steps, -1)))

    alone = starts(1)
    assert len(set(alone[:8].flat)) == 8 * batch_size * accumulation  # the first epoch's whole steps
    for world in (2, 4):
        np.testing.assert_array_equal(starts(world), alone)


def test_evaluation_windows_are_fixed_and_do_not_overlap(counting):
    """As many as asked for or as fit, spread over the whole split, each with a target for its last input."""
    split = Split(counting, "val", BLOCK)
    for count in (1, 2, 4, 9, 1000):
        starts = split.fixed(count)
        assert len(starts) == min(count, 9) and starts == split.fixed(count)
        assert (np.diff(starts) >= BLOCK).all() and np.diff([*starts, 90]).max() <= 90 / len(starts) + BLOCK
        assert split.windows(starts)[1].max() < 100


def test_a_split_shorter_than_a_window_is_refused(counting):
    """A window of exactly the split is read; one token more is an error with both numbers."""
    assert Split(counting, "val", 99).batch([0, 1])[1][:, -1].tolist() == [99, 99]
    with pytest.raises(UserError, match="100 tokens.* = 101"):
        Split(counting, "val", 100)


# ----------------------------------------------------------------------------------------------------------------------
# configurator.py


@dataclass
class Knobs:
    depth: int = 4  # number of layers
    learning_rate: float = 0.1  # length of a step
    beta: float | None = None  # velocity kept
    causal: bool = True  # look back only
    name: str = "run"  # what to call it

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")


def test_the_later_setting_wins(tmp_path):
    """Between files and flags, in either order."""
    file = tmp_path / "a.toml"
    file.write_text('depth = 8\nname = "file"\n')
    assert parse(Knobs, [str(file), "--depth=2"]) == Knobs(depth=2, name="file")
    assert parse(Knobs, ["--depth=2", "--causal=False", str(file)]) == Knobs(depth=8, name="file", causal=False)


def test_values_take_the_type_of_their_knob(tmp_path):
    """Whole numbers for floats, True and False in any case, None where it is allowed, and = within text."""
    file = tmp_path / "a.toml"
    file.write_text("learning_rate = 1\nbeta = 2\ncausal = false\n")
    for arguments in ([str(file)], ["--learning_rate=1", "--beta=2", "--causal=FALSE"]):
        knobs = parse(Knobs, arguments)
        assert knobs == Knobs(learning_rate=1.0, beta=2.0, causal=False)
        assert type(knobs.learning_rate) is type(knobs.beta) is float
    for arguments in (["--depth", "2", "--causal", "--name", "a b"], ["--depth", "2", "--causal", "true", "--name=a b"]):
        assert parse(Knobs, arguments) == Knobs(depth=2, causal=True, name="a b")
    assert parse(Knobs, ["--beta", "-1.5", "--causal", "False"]) == Knobs(beta=-1.5, causal=False)
    with pytest.raises(UserError, match="--name needs a value; one that begins with -- is given as --name=--"):
        parse(Knobs, ["--name", "--causal"])
    with pytest.raises(UserError, match="no knob is named 'depht'; did you mean depth"):
        parse(Knobs, ["--depht", "2"])
    knobs = parse(Knobs, ["--beta=2", "--beta=None", "--causal=true", "--learning_rate=3e-4", "--name=a=b"])
    assert knobs == Knobs(learning_rate=3e-4, name="a=b")


def test_all_problems_come_in_one_message(tmp_path):
    """Unknown keys with the nearest name, wrong types from files and flags, and a value that the dataclass refuses."""
    file = tmp_path / "a.toml"
    file.write_text('learning_rat = 1\nbeta = "high"\nname = 3\n')
    with pytest.raises(UserError) as error:
        parse(Knobs, [str(file), "--depth=0", "--causal=2", "--learning_rate=None", "--zzz=1", "loose"])
    lines = str(error.value).splitlines()
    parts = [
        ("a.toml", "'learning_rat';", "did you mean learning_rate?"),
        ("a.toml", "beta='high'", "a number or None"),
        ("a.toml", "name=3", "text"),
        ("command line", "causal='2'", "True or False"),
        ("command line", "learning_rate='None'", "a number"),
        ("command line", "no knob is named 'zzz'"),
        ("command line", "'loose'", "--key=value"),
        ("depth=0 must be at least 1",),
    ]
    assert len(lines) == len(parts)
    assert all(part in line for line, several in zip(lines, parts, strict=True) for part in several), error.value


def test_the_home_folder(monkeypatch):
    """~ in the name of a file or folder, which a shell leaves alone behind an equals sign; not in other text."""
    monkeypatch.setenv("HOME", "/home/me")
    cfg = parse(train.Config, ["--out_dir=~/x", "--init_from=~/y.pt", "--data_dir", "~/z", "--dataset=~/d"])
    assert (cfg.out_dir, cfg.init_from, cfg.data_dir, cfg.dataset) == ("/home/me/x", "/home/me/y.pt", "/home/me/z", "~/d")
    assert parse(sample.Config, ["--out_dir=~/x", "--start=~/"]).out_dir == "/home/me/x"


@pytest.mark.parametrize("content, says", [(None, "cannot read"), ("depth = ", "not valid TOML")])
def test_a_bad_file_is_named(content, says, tmp_path):
    """A configuration that is missing or not TOML."""
    file = tmp_path / "a.toml"
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=f"{says}.*a.toml|a.toml.*{says}"):
        parse(Knobs, [str(file)])


def test_help_explains_every_knob(capsys):
    """A line for each knob of train.py with its name, default and meaning."""
    from train import Config

    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--no-such", "--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    meanings = {words[0]: words[1:] for words in lines if words}
    assert exit.value.code == 0
    assert all(meanings.get(f"{knob.name}={knob.default}") for knob in fields(Config))
