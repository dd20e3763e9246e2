"""
A quarter of an hour on a card: how fast are the models there, are they right, and what do they learn?

    python -m experiments.card --nanogpt ../nanoGPT --minutes 12    all of it on one CUDA card, after python prepare.py minipile
    python -m experiments.card training gradients                   some of it
    python -m experiments.card --rehearse                           the same at toy size, on a CPU as well

    training      a training step of 124M parameters in bfloat16, compiled, beside nanoGPT's
    generation    one and eight texts from 124M parameters, beside nanoGPT's
    gradients     every variant's loss and gradient against float64 on the CPU
    cached        every variant's text with its cache and without
    resumed       every variant's run, stopped and resumed, against one that never stopped, bit for bit
    short_runs    training in float16, and one process under torchrun
    learning      30M parameters on --dataset with Muon, for as many tokens as the time allows

Each result is kept as soon as it is there, in --out: card.json, a list of tables; learning.md, .json and .png as
experiments.compare makes them; and sample.txt. All systems of a table compile, or learn, at the same time, each in a process of
its own, so that the card does not wait for the compiler. Training steps are timed in turn.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import checkpoint
import train
from device import flops_per_token, memory_gb
from experiments import bars, bench
from experiments.arguments import parser_with
from experiments.bench import DEVICE, NANOGPT
from experiments.records import Records, markdown, write
from guard import UserError, cli
from model import GPT, VARIANTS, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
TIMED = (NANOGPT, "MHA", "NagMHA", "YuriiFormer", "LightMHA2nd1st", "MHA2nd1st", "HuberMHA", "GatedLinearMHA")
LEARNING = ("MHA", "NagMHA", "MomenMHA", "LightMHA2nd1st", "MHA2nd1st", "YuriiFormer", "EmbedControl")
# models for health, speed and learning, the sections below, and for a rehearsal. Systems that learn share the card's memory
SMALL = dict(n_layer=4, n_head=2, n_embd=128, block_size=512)
GPT124M = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=12, new_tokens=128)
GPT30M = dict(block_size=1024, batch_size=8, gradient_accumulation_steps=2, eval_iters=26)  # of config/minipile_30m.toml
TOY = dict(n_layer=2, n_head=1, n_embd=16, block_size=32)
TOY_RUN = TOY | dict(batch_size=2, gradient_accumulation_steps=1, eval_iters=2, vocab_size=None, compile=False)


def flags(knobs):
    return [f"--{name}={value}" for name, value in knobs.items()]


def left(args):
    """Seconds until the program is to end."""
    return max(1.0, args.end - time.monotonic())


def failed(error):
    return dict(right=False, error=(str(error) or type(error).__name__).splitlines()[0])


# ----------------------------------------------------------------------------------------------------------------------
# speed. Every part yields the rows of a table: a name, and its columns


def steps_of(args, name):
    """A function that takes training steps; it returns the seconds of the first, the median seconds and peak memory in GB."""
    step = bench.training_step(args, name)

    def steps():
        began = time.monotonic()
        try:
            step()
        except torch.OutOfMemoryError:  # the others hold the card's memory just now
            time.sleep(5)
            step()
        first, seconds = time.monotonic() - began, statistics.median(step()[-1] for _ in range(5))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # for the others
        return first, seconds, memory_gb(DEVICE)

    return steps


def training(args):
    steps, found = {name: bench.elsewhere(steps_of, args, name) for name in TIMED}, {}
    pool, patience = ThreadPoolExecutor(len(TIMED)), time.monotonic() + left(args) / 3
    try:
        first = {name: pool.submit(step) for name, step in steps.items()}  # the first step of each compiles, all at once
        for name, future in first.items():
            try:
                found[name] = [future.result(timeout=max(0.0, patience - time.monotonic()))]
            except Exception as error:
                yield name, failed(error)
        for _ in range(5):
            for name, results in found.items():
                results.append(steps[name]())
    finally:
        steps.clear()  # so the idle processes end
        for process in multiprocessing.active_children():
            process.join(5)
            process.kill()
        pool.shutdown()
    multiply = bars.matrix_products(args, 8192 if DEVICE == "cuda" else 256)
    flop, tokens = statistics.median(multiply() for _ in range(9)), args.batch_size * args.block_size
    for name, results in found.items():
        (compiling, *_), (_, *seconds), memory = zip(*results, strict=True)  # no speed from the first: others still compiled
        config = GPTConfig(
            "MHA" if name == NANOGPT else name, bias=False, **{size: getattr(args, size) for size in bench.SIZES}
        )
        with torch.device("meta"):
            model = GPT(config)
        seconds = statistics.median(seconds)
        rate = flops_per_token(model) * tokens / seconds
        yield name, {"ms per step": 1e3 * seconds, "tokens/s": tokens / seconds, "TFLOP/s": rate / 1e12,
                     "share of products": rate * flop, "GB": max(memory), "compiling, s": compiling}  # fmt: skip


def generation(args):
    for batch in (1, 8):
        for name in (NANOGPT, "MHA", "GatedLinearMHA"):
            make = bench.elsewhere if name == NANOGPT else lambda make, *arguments: make(*arguments)
            generate = make(bench.generation, args, name, batch)
            seconds = min(generate() for _ in range(3))
            tokens = batch * args.new_tokens
            yield f"{name}, batch {batch}", {"tokens/s": tokens / seconds, "ms per token": 1e3 * seconds / args.new_tokens}


# ----------------------------------------------------------------------------------------------------------------------
# health


def small(args, variant, device=DEVICE, noise=0.02):
    """A small model in eval mode, away from its initial weights, where many terms vanish."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(variant, vocab_size=512, **args.small)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model.to(device)


def gradient(model, idx, dtype):
    """The loss of a model and its gradient, as one vector, with matrix products in dtype."""
    device = model.lm_head.weight.device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(idx.to(device), idx.flip(0).to(device))[1]
    return loss.item(), torch.cat([g.flatten().double().cpu() for g in torch.autograd.grad(loss, [*model.parameters()])])


def gradients(args):
    idx = torch.randint(512, (2, args.small["block_size"]), generator=torch.Generator().manual_seed(0))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for name in VARIANTS:
            loss, g = gradient(small(args, name, "cpu").double(), idx, torch.float64)
            row = dict(right=True)
            for dtype, least in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
                loss_here, g_here = gradient(small(args, name), idx, dtype)
                errors = abs(loss_here / loss - 1), ((g_here - g).norm() / g.norm()).item()
                row |= {f"{what}, {str(dtype)[6:]}": error for what, error in zip(("loss", "gradient"), errors, strict=True)}
                row["right"] &= max(errors) < least
            yield name, row
    finally:
        torch.set_float32_matmul_precision(precision)


def cached(args):
    for name in VARIANTS:
        model = small(args, name)
        idx = start = torch.randint(512, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for _ in range(24):
            idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), 1)
        yield name, dict(right=torch.equal(model.generate(start, 24, temperature=0), idx))


def small_run(args, folder, **knobs):
    """The flags of a small run of train.py."""
    common = dict(dataset=args.dataset, data_dir=args.data_dir, out_dir=folder, learning_rate=2e-3, warmup_iters=1, bias=False,
                  eval_interval=10, eval_iters=1, log_interval=1, batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
    return flags(common | args.small | knobs)


def run(args, folder, **knobs):
    """Such a run in this process, not compiled: its last checkpoint and its training losses."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(small_run(args, folder, compile=False, **knobs))
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        losses = [line["train_loss"] for line in map(json.loads, file) if "train_loss" in line]
    return checkpoint.load(os.path.join(folder, "ckpt.pt")), losses


def resume(args):
    """A function that stops and resumes a run of every variant; it returns whether each becomes the run that never stopped."""

    def rows():
        for name in VARIANTS:
            whole, half = (dict(variant=name, deterministic=True, lr_decay_iters=6, max_iters=n) for n in (6, 3))
            with tempfile.TemporaryDirectory() as folder:
                try:
                    straight = run(args, f"{folder}/whole", **whole)[0]["model"]
                    run(args, f"{folder}/parts", **half)
                    parts = run(args, f"{folder}/parts", **whole, init_from="resume")[0]["model"]
                    yield name, dict(right=all(torch.equal(straight[key], parts[key]) for key in straight))
                except (UserError, RuntimeError) as error:
                    yield name, failed(error)

    return lambda: [*rows()]


def resumed(args):
    yield from bench.elsewhere(resume, args)()  # cuBLAS settles at a process's first product whether it is deterministic


def short_runs(args):
    with tempfile.TemporaryDirectory() as folder:
        state, losses = run(args, f"{folder}/1", variant="NagMHA", dtype="float16", max_iters=20)
        last = f"{losses[0]:.3f} to {losses[-1]:.3f}, scale {state['scaler']['scale']:g}"
        yield "float16", dict(right=losses[-1] < losses[0], last=last)
        for name in ("MHA", "MHA2nd1st"):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "train.py"]
            command += small_run(args, f"{folder}/{name}", variant=name, max_iters=10)
            done = subprocess.run(command, capture_output=True, text=True, timeout=left(args))
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line]
            right = done.returncode == 0 and "failed" not in done.stdout
            yield f"torchrun, {name}", dict(right=right, last=(lines or [""])[-1])


# ----------------------------------------------------------------------------------------------------------------------
# learning


def compare(args, name, steps, seeds, **knobs):
    """A comparison of LEARNING: the seconds that it took, and its systems as in its JSON. Raises UserError."""
    knobs = dict(dataset=args.dataset, data_dir=args.data_dir, optimizer="muon", learning_rate=args.learning_rate,
                 min_lr=args.learning_rate / 10, log_interval=5, warmup_iters=steps // 10) | args.learner | knobs  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "experiments.compare",
        name,
        "--out",
        args.out,
        "--steps",
        steps,
        "--seeds",
        *seeds,
        "--untimed",
    ]
    command += ["--config", ROOT / "config" / "minipile_30m.toml", "--jobs", len(LEARNING), "--systems", *LEARNING]
    began = time.monotonic()
    process = subprocess.Popen([*map(str, command), "--", *flags(knobs)], stdout=subprocess.DEVNULL, start_new_session=True,
                               env=os.environ | dict(PYTHONPATH=str(ROOT)))  # fmt: skip
    try:
        process.wait(timeout=left(args))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the runs that it started
        raise UserError(f"{name}: {steps} steps did not end in time") from None
    if process.returncode:
        raise UserError(f"{name} failed: its error is above")
    with open(os.path.join(args.out, f"{name}.json")) as file:
        return time.monotonic() - began, json.load(file)["systems"]


def learning(args):
    steps = args.steps
    for name in ("learning_short", "learning"):  # an earlier call's: its finished runs would not run again
        shutil.rmtree(f"out/{name}", ignore_errors=True)
    if not steps:  # a short comparison measures how long a step takes
        seconds, systems = compare(args, "learning_short", 40, [0], eval_interval=40)
        a_step = max(s["per_step"]["tokens"] / s["runs"][0]["tokens_per_second"] for s in systems.values())
        starting = seconds - 40 * a_step
        steps = min(args.most_steps, int((left(args) / args.seeds - 1.2 * starting) / (1.1 * a_step)))
        if steps < 50:
            raise UserError(f"the time left is enough for {steps} steps only: give more --minutes")
    for n in range(1, args.seeds + 1):
        seconds, systems = compare(args, "learning", steps, range(1, n + 1), eval_interval=-(-steps // 6))
        for name, s in systems.items():
            run = s["runs"][n - 1]
            yield f"{name}, seed {n}", {"steps": steps, "loss": run["validation"][-1][1], "GB": run["memory_gb"],
                                        "tokens/s, all at once": run["tokens_per_second"], "all runs, s": seconds}  # fmt: skip
        if n == 1:
            best = min(systems, key=lambda name: systems[name]["runs"][0]["validation"][-1][1])
            of_best = f"--out_dir=out/learning/{best}-1", "--start=The", "--max_new_tokens=200", "--num_samples=2"
            text = subprocess.run([sys.executable, ROOT / "sample.py", *of_best], capture_output=True, text=True)
            write(os.path.join(args.out, "sample.txt"), f"{best} after {steps} steps\n\n{text.stdout or text.stderr}")


# ----------------------------------------------------------------------------------------------------------------------

PARTS = dict(training=training, generation=generation, gradients=gradients, cached=cached, resumed=resumed,
             short_runs=short_runs, learning=learning)  # fmt: skip


def keep(records, title, part, args):
    """Make a part's table and keep each row as it comes. An error is the last row. Returns whether all rows are right."""
    began = time.monotonic()
    table = records.add(dict(title=title, made_with=checkpoint.made_with(DEVICE), rows={}))
    rows = table["rows"]
    try:
        for name, row in part(args):
            rows[name], table["seconds"] = row, time.monotonic() - began
            records.save()
    except Exception as error:
        rows["error"], table["seconds"] = failed(error), time.monotonic() - began
        records.save()
    columns = [*dict.fromkeys(key for row in rows.values() for key in row)]
    cells = [
        [f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else row.get(c, "") for c in columns] for row in rows.values()
    ]
    lines = [[name, *line] for name, line in zip(rows, cells, strict=True)]
    print(markdown([title, *columns], lines) + f"\n{table['seconds']:.0f} s\n", flush=True)
    return all(row.get("right", True) for row in rows.values())


def main(arguments):
    parser = parser_with(__doc__, nanogpt=None, dtype="bfloat16")
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--minutes", type=float, default=12, help="time for all of it")
    parser.add_argument("--rehearse", action="store_true", help="do it at toy size")
    parser.add_argument("--dataset", default="minipile", help="folder below --data_dir")
    parser.add_argument("--data_dir", default=str(ROOT / "data"))
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="highest rate of the part learning")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds of the part learning")
    parser.add_argument("--steps", type=int, help="of the part learning; default: as many as the time left allows")
    parser.add_argument("--out", help="folder of the results; default: results/gpu, for a rehearsal out/rehearsal")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        raise UserError(f"{', '.join(unknown)} is none of {', '.join(PARTS)}")
    if DEVICE == "cpu" and not args.rehearse:
        raise UserError(f"torch {torch.__version__} sees no CUDA card: --rehearse does the same at toy size on a CPU")
    args.out = os.path.abspath(args.out or ("out/rehearsal" if args.rehearse else "results/gpu"))
    args.end, args.compile = time.monotonic() + 60 * args.minutes, True
    args.small, args.learner, args.most_steps = (TOY, TOY_RUN, 60) if args.rehearse else (SMALL, GPT30M, 10**6)
    sizes = GPT124M | (dict(TOY, vocab_size=300, batch_size=2, new_tokens=8) if args.rehearse else {})
    args = argparse.Namespace(**vars(args) | sizes)
    with Records(os.path.join(args.out, "card.json")) as records:
        wrong = [name for name in args.parts or PARTS if not keep(records, name, PARTS[name], args)]
    if wrong:
        raise UserError(f"see above what went wrong in {', '.join(wrong)}")


if __name__ == "__main__":
    cli(main)
