"""
The promises of speed, and the numbers that experiments.bench's functions measure for them here:

    python -m experiments.bars --nanogpt ../nanoGPT --source DIR --compile
    python -m experiments.bars training starting --margin 2        some parts; an error if a bar is missed by a factor over 2

A bar is a number promised. The last line is an error if a number misses its bar by a factor over --margin. The table is added
to --out. The things to compare run in turn, and a time is a median of rounds. Most numbers are ratios of two times; a start
is a difference, and a new token after a prompt is a ratio of two differences. Memory is that of one step.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoint
from data import Split, Writer, get_tokenizer
from device import flops_per_token, short_dtype
from experiments import bench, records
from experiments.arguments import parser_with
from experiments.bench import BYTES, DEVICE, NANOGPT
from experiments.records import markdown
from guard import UserError, cli

# on a card the larger model: the smaller one would measure the launches of kernels
SIZES = BYTES if DEVICE == "cpu" else dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=12)
GPT30M = BYTES | dict(block_size=512, vocab_size=50304, batch_size=2)
LINEAR = ("LinearMHA", "GatedLinearMHA")
COPIES = 20  # of the text to prepare: so many that the start costs little time, as with all of MiniPile


def sized(args, sizes, **others):
    return argparse.Namespace(**vars(args) | sizes | others)


def medians(functions, rounds, warm_up=2):
    """Medians of what the functions return, called in turn. A training step returns three numbers: the last one counts."""
    found = bench.alternating(dict(enumerate(functions)), rounds, warm_up)
    return [statistics.median(np.atleast_1d(value)[-1].item() for value in values) for values in found.values()]


def training(args):
    for name, sizes in dict(bytes=BYTES, GPT30M=GPT30M).items() if DEVICE == "cpu" else [("GPT124M", SIZES)]:
        steps = bench.rows(bench.training_step, sized(args, sizes), (NANOGPT, "MHA"))
        nanogpt, ours, product = medians(
            [*steps.values(), matrix_products(args, 8192 if DEVICE == "cuda" else 2048)], args.rounds
        )
        yield f"training, {name}: tokens/s over nanoGPT's", nanogpt / ours
        flops = flops_per_token(bench.build(sized(args, sizes), "MHA")[0]) * sizes["batch_size"] * sizes["block_size"]
        yield f"training, {name}: share of the FLOP/s of matrix products", flops * product / ours


def matrix_products(args, n, times=10):
    """A function that multiplies n x n matrices in args.dtype; it returns the seconds per FLOP."""
    a = torch.randn(n, n, device=DEVICE).to(getattr(torch, args.dtype))

    def multiply():
        start = bench.synchronized()
        for _ in range(times):
            a @ a
        return (bench.synchronized() - start) / (times * 2 * n**3)

    return multiply


def overheads(args):
    names = ("MHA", "MomenMHA", "NagMHA", "YuriiFormer", "TMMFormer", "LightMHA2nd1st")
    base, *times = medians(bench.rows(bench.training_step, sized(args, SIZES), names).values(), args.rounds)
    yield from ((f"{name}: step over MHA's", seconds / base) for name, seconds in zip(names[1:], times, strict=True))
    long = sized(args, SIZES, block_size=1024, batch_size=4)
    base, newton = medians(bench.rows(bench.training_step, long, ("MHA", "MHA2nd1st")).values(), args.rounds)
    yield "MHA2nd1st: step over MHA's at 1,024 tokens", newton / base


def flatness(args):
    for name in LINEAR:
        cells = [sized(args, BYTES, n_layer=2, block_size=T, batch_size=4096 // T) for T in (1024, 4096)]
        short, long = medians([bench.training_step(cell, name) for cell in cells], args.rounds)
        yield f"{name}: time per token at 4,096 tokens over 1,024", long / short


def generating(args):
    args = sized(args, SIZES, block_size=1024, new_tokens=1000)
    alone = bench.rows(bench.generation, args, (NANOGPT, "MHA"))
    nanogpt, ours, eight = medians([*alone.values(), bench.generation(args, "MHA", batch=8)], args.generations, warm_up=0)
    yield "generating 1,000 tokens, MHA: speed over nanoGPT's", nanogpt / ours
    yield "generating 8 texts at once, MHA: tokens/s over one text's", 8 * ours / eight


def positions(args):
    for name in LINEAR:
        model = bench.build(sized(args, BYTES, block_size=4200), name)[0].eval()

        def generate(past, new, model=model):
            began = bench.synchronized()
            model.generate(torch.zeros(1, past, dtype=torch.long, device=DEVICE), new)
            return bench.synchronized() - began

        # the call for one token reads the prompt too: its time is subtracted
        calls = [lambda past=past, new=new: generate(past, new) for past in (1, 4000) for new in (1, 201)]
        first, early, prompt, late = medians(calls, args.rounds)
        yield f"{name}: time of a new token after 4,000 over one after a single token", (late - prompt) / (early - first)


def depth(args):
    sizes = sized(args, BYTES, n_embd=256, n_head=4, batch_size=8)
    steps = [bench.training_step(sizes, "MHA", **bench.POLYAK, reversible=True, n_layer=n) for n in (6, 48)]
    # without the gradients: at the peak all of them are there
    shallow, deep = (bench.peak(step) - step.gradients / 2**20 for step in steps)
    yield "reversible: peak activation memory of 48 layers over 6", deep / shallow


def tiktoken_alone(source, part, parts, copies):
    """A function that tokenizes copies of a part of the documents, already in memory, with tiktoken alone; returns MB/s."""
    import datasets

    documents = [text.encode() for text in datasets.load_dataset(source, split="train")["text"][part::parts]] * copies
    encoding, size = get_tokenizer("gpt2"), sum(map(len, documents))

    def tokenize():
        # new strings each time, as in prepare: Python keeps a string's UTF-8, so a second pass over it would be faster
        texts = [document.decode() for document in documents]
        start = time.perf_counter()
        for text in texts:
            encoding.encode_to_numpy(text, disallowed_special=())
        return size / 1e6 / (time.perf_counter() - start)

    return tokenize


def preparing(args):
    paths, parts = sorted(Path(args.source).resolve().rglob("*-*.parquet")), range(args.workers)
    if not paths:
        raise UserError(f"--source {args.source} holds no SPLIT-*.parquet: give text in the layout of MiniPile")
    alone = [bench.elsewhere(tiktoken_alone, args.source, part, args.workers, COPIES) for part in parts]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        os.mkdir(f"{folder}/source")
        for i, path in itertools.product(range(COPIES), paths):
            split, rest = path.name.split("-", 1)  # a file whose name holds its split twice would be read twice
            os.symlink(path, f"{folder}/source/{split}-{i}-{rest}")
        command = [sys.executable, "prepare.py", "bench", "--tokenizer=gpt2", f"--source={folder}/source", f"--out={folder}"]
        cache = dict(HF_DATASETS_CACHE=f"{folder}/cache")

        def prepare():
            result = subprocess.run(
                [*command, f"--workers={args.workers}"], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | cache
            )
            return float(result.stdout.split()[-2])

        ours, theirs = medians([prepare, lambda: sum(pool.map(lambda one: one(), alone))], args.generations, warm_up=1)
    yield f"preparing a loaded data set: MB/s with {args.workers} worker(s)", ours
    yield "preparing a loaded data set: MB/s over those of tiktoken alone", ours / theirs


def loading(args):
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(folder, "train", np.uint16, 1 << 27)
        writer.add(np.zeros(1 << 27, np.uint16))
        meta = dict(tokenizer="bytes", vocab_size=257, dtype="uint16", bytes=dict(train=1, val=1))
        records.write(os.path.join(folder, "meta.json"), json.dumps(meta | dict(shards=dict(train=writer.shards, val=[]))))
        split, numbers = Split(folder, "train", SIZES["block_size"]), iter(range(1 << 40))

        def batch():
            start = time.perf_counter()
            split.batch([next(numbers) for _ in range(SIZES["batch_size"])])
            return time.perf_counter() - start

        reading, step = medians([batch, bench.training_step(sized(args, SIZES), "MHA")], args.rounds)
    yield "data: reading a batch over a training step", reading / step


def starting(args):
    def start(command):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        model = bench.build(sized(args, BYTES), "MHA")[0]
        state = dict(model=model.state_dict(), model_config=dataclasses.asdict(model.config), tokenizer="bytes")
        checkpoint.save(folder, state, best=True)
        sample = ["sample.py", f"--out_dir={folder}", "--max_new_tokens=1", "--device=cpu"]
        commands = ["-c", "import torch"], ["train.py", "--help"], sample
        alone, train, sample = medians([lambda c=command: start(c) for command in commands], args.rounds, warm_up=1)
    yield "train.py --help: seconds beyond importing torch", train - alone
    yield "sample.py, one token: seconds beyond importing torch", sample - alone


# The promise for each number measured above: its direction, its bar on a CPU and its bar on a CUDA card. How much a step gains
# over nanoGPT's depends on the CPU. So on a CPU the promise is a share of the FLOP/s of matrix products.
PROMISES = {
    "training, bytes: share of the FLOP/s of matrix products": (">=", 0.75, None),
    "training, GPT30M: share of the FLOP/s of matrix products": (">=", 0.75, None),
    "training, GPT124M: share of the FLOP/s of matrix products": (">=", None, 0.4),
    "training, GPT124M: tokens/s over nanoGPT's": (">=", None, 1.0),
    "MomenMHA: step over MHA's": ("<=", 1.05, 1.05),
    "NagMHA: step over MHA's": ("<=", 1.05, 1.05),
    "YuriiFormer: step over MHA's": ("<=", 1.05, 1.05),
    "TMMFormer: step over MHA's": ("<=", 1.05, 1.05),
    "LightMHA2nd1st: step over MHA's": ("<=", 1.2, 1.2),
    "MHA2nd1st: step over MHA's at 1,024 tokens": ("<=", 2.0, 2.0),
    "LinearMHA: time per token at 4,096 tokens over 1,024": ("<=", 1.1, 1.1),
    "GatedLinearMHA: time per token at 4,096 tokens over 1,024": ("<=", 1.1, 1.1),
    "generating 1,000 tokens, MHA: speed over nanoGPT's": (">=", 10.0, 1.0),
    "generating 8 texts at once, MHA: tokens/s over one text's": (">=", 2.0, 4.0),
    "LinearMHA: time of a new token after 4,000 over one after a single token": ("<=", 1.1, 1.1),
    "GatedLinearMHA: time of a new token after 4,000 over one after a single token": ("<=", 1.1, 1.1),
    "reversible: peak activation memory of 48 layers over 6": ("<=", 1.3, 1.3),
    "preparing a loaded data set: MB/s over those of tiktoken alone": (">=", 0.9, 0.9),
    "data: reading a batch over a training step": ("<=", 0.01, 0.05),
    "train.py --help: seconds beyond importing torch": ("<=", 0.5, 0.5),
    "sample.py, one token: seconds beyond importing torch": ("<=", 0.5, 0.5),
}
PARTS = dict(training=training, overheads=overheads, flatness=flatness, generating=generating, positions=positions, depth=depth,
             preparing=preparing, loading=loading, starting=starting)  # fmt: skip


def main(arguments):
    parser = parser_with(__doc__, nanogpt=None, compile=False, dtype=short_dtype(DEVICE))
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--source", metavar="DIR", help="preparing: text in MiniPile's layout; without --source it is left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="preparing: processes that tokenize")
    parser.add_argument("--rounds", type=int, default=15, help="training steps or program starts per median")
    parser.add_argument("--generations", type=int, default=3, help="generated texts or prepared data sets per median")
    parser.add_argument("--margin", type=float, default=1.0, help="how far from its bar a ratio may be, as a factor")
    parser.add_argument("--out", default="results/bench.json", help="the list that the result is added to")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"{', '.join(unknown)} is none of {', '.join(PARTS)}")
    if "preparing" in args.parts and not args.source:
        raise UserError("preparing needs text in the layout of MiniPile: give its folder with --source")
    for folder, holds in (args.source, ""), (args.nanogpt, "model.py"):
        if folder and not os.path.exists(os.path.join(folder, holds)):
            raise UserError(f"{os.path.join(folder, holds)} does not exist: give another --source or --nanogpt")
    records.Records(args.out)  # if it cannot be read, the error comes before the work
    parts = args.parts or [name for name in PARTS if name != "preparing" or args.source]
    for given, otherwise in (
        (args.nanogpt, "MHA takes nanoGPT's place and runs in the same way: --nanogpt DIR takes nanoGPT's own code"),
        (args.source, "the part preparing is left out: give it text with --source DIR"),
        (args.compile, "the promises are for compiled variants, and these are not compiled: add --compile"),
    ):
        if not given:
            print(otherwise)
    table, missed = [], []
    for name in parts:
        for what, value in PARTS[name](args):
            sense, *bars = PROMISES.get(what, (">=", None, None))
            bar = bars[DEVICE == "cuda"]
            promise = "" if bar is None else f"{sense} {bar:g}"
            table.append([what, f"{value:.4g}", promise])
            print(f"{value:8.3f}  {promise:8} {what}", flush=True)
            if promise and not (value >= bar / args.margin if sense == ">=" else value <= bar * args.margin):
                missed.append(f"{what} is {value:.4g}, its bar {promise}")
    print("\n" + markdown(["promise", "here", "bar"], table))
    with records.Records(args.out) as known:
        known.add(bench.record(args, "bars", table))
    if missed:
        raise UserError("\n".join(missed))


if __name__ == "__main__":
    cli(main)
