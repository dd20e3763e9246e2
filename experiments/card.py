"""
A quarter of an hour on a card: are the models right there, how fast are they, and what do they learn?

    python -m experiments.card --nanogpt ../nanoGPT --minutes 9        on one CUDA card, after python prepare.py minipile
    python -m experiments.card --rehearse                              the same at toy size, on a CPU as well

    health      every variant's loss and gradient against float64 on the CPU; float16; resumed runs; cached text; torchrun
    speed       a training step and generation of 124M parameters in bfloat16, beside nanoGPT
    learning    30M parameters on --dataset with Muon: systems side by side, for as many tokens as the time allows

Each result is kept as soon as it is there, in --out: card.json, a list of tables; learning.md, .json and .png as
experiments.compare makes them; and sample.txt. All systems of a part compile, and learn, at the same time, each in a process of
its own, so that a card does not wait for the compiler. Their steps are timed in turn.
"""

import argparse
import contextlib
import io
import json
import os
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
TIMED = (NANOGPT, "MHA", "NagMHA", "YuriiFormer", "LightMHA2nd1st", "MHA2nd1st", "GatedLinearMHA")
LEARNING = ("MHA", "NagMHA", "MomenMHA", "LightMHA2nd1st", "MHA2nd1st", "YuriiFormer", "EmbedControl")
# the models: those of health, speed and learning, and those of a rehearsal. Systems that learn share the card's memory
SMALL = dict(n_layer=4, n_head=2, n_embd=128, block_size=256)
GPT124M = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, batch_size=12)
GPT30M = dict(block_size=1024, batch_size=8, gradient_accumulation_steps=4, eval_iters=26)  # of config/minipile_30m.toml
TOY = dict(n_layer=2, n_head=1, n_embd=16, block_size=32)
TOY_RUN = TOY | dict(batch_size=2, gradient_accumulation_steps=1, eval_iters=2, compile=False)


# ----------------------------------------------------------------------------------------------------------------------
# health


def flags(knobs):
    return [f"--{name}={value}" for name, value in knobs.items()]


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
    with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = model(idx.to(device), idx.flip(0).to(device))[1]
    return loss.item(), torch.cat([g.flatten().double().cpu() for g in torch.autograd.grad(loss, [*model.parameters()])])


def gradients(args):
    """For each variant the relative error of loss and gradient here, in float32 and bfloat16, against float64 on the CPU."""
    idx = torch.randint(512, (2, args.small["block_size"]), generator=torch.Generator().manual_seed(0))
    for name in VARIANTS:
        right, exact = gradient(small(args, name, "cpu").double(), idx, torch.float64)
        row = {}
        for dtype in (torch.float32, torch.bfloat16):
            loss, g = gradient(small(args, name), idx, dtype)
            short = str(dtype).removeprefix("torch.")
            row |= {f"loss, {short}": abs(loss / right - 1), f"gradient, {short}": ((g - exact).norm() / exact.norm()).item()}
        yield name, row | dict(right=row["gradient, float32"] < 1e-3 and row["loss, bfloat16"] < 1e-2)


def cached(args):
    """Is the likeliest continuation the same with the cache and without?"""
    for name in VARIANTS:
        model, new = small(args, name), args.small["block_size"] // 2
        idx = start = torch.randint(512, (2, 5), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for _ in range(new):
            idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), 1)
        yield name, dict(right=torch.equal(model.generate(start, new, temperature=0), idx))


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


def resumed(args):
    """Does a run that stops after half its steps and is resumed become the one that never stopped, bit for bit?"""
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


def short_runs(args):
    """20 steps in float16, where the scaler has to find its scale; and 10, compiled, of one process under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        state, losses = run(args, folder, variant="NagMHA", dtype="float16", max_iters=20)
        yield (
            "float16",
            dict(right=losses[-1] < losses[0], last=f"{losses[0]:.3f} to {losses[-1]:.3f}; scaler {state['scaler']}"),
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "train.py"]
        done = subprocess.run([*command, *small_run(args, f"{folder}/2", max_iters=10)], capture_output=True, text=True)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line]
        yield "torchrun", dict(right=done.returncode == 0 and "failed" not in done.stdout, last=lines[-1])


def health(args):
    # as train.py sets it for --deterministic, but cuBLAS reads it at the first product of a process
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    for check in (gradients, cached, resumed, short_runs):
        yield check.__name__, check(args)
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]


# ----------------------------------------------------------------------------------------------------------------------
# speed


def training(args, name):
    """A function that takes training steps; it returns the seconds of the median one, and the peak of memory in GB."""
    step = bench.training_step(args, name)

    def steps():
        step()  # takes its memory back from the card
        seconds = statistics.median(step()[-1] for _ in range(args.steps))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # for the others
        return seconds, memory_gb(DEVICE)

    return steps


def compiling(args):
    """Processes of training steps, {name: its function}, which compile now, and their first results, {name: a future}."""
    steps, pool = {name: bench.elsewhere(training, args, name) for name in TIMED}, ThreadPoolExecutor(len(TIMED))
    first = {name: pool.submit(step) for name, step in steps.items()}
    pool.shutdown(wait=False)
    return steps, first


def steps_in_turn(args, steps, first):
    found = {name: [] for name in steps}
    for name, future in first.items():
        try:
            future.result(timeout=left(args))
        except Exception as error:
            del found[name]
            yield name, failed(error)
    for _ in range(args.rounds):
        for name, results in found.items():
            results.append(steps[name]())
    multiply = bars.matrix_products(args, 8192 if DEVICE == "cuda" else 256)
    flop, tokens = statistics.median(multiply() for _ in range(9)), args.batch_size * args.block_size
    for name, results in found.items():
        seconds, memory = statistics.median(s for s, _ in results), max(m for _, m in results)
        config = GPTConfig(
            "MHA" if name == NANOGPT else name, bias=False, **{size: getattr(args, size) for size in bench.SIZES}
        )
        with torch.device("meta"):
            model = GPT(config)
        rate = flops_per_token(model) * tokens / seconds
        yield name, {"ms per step": 1e3 * seconds, "tokens/s": tokens / seconds, "TFLOP/s": rate / 1e12,
                     "share of products": rate * flop, "GB": memory}  # fmt: skip


def generation(args):
    for batch in (1, 8):
        for name in (NANOGPT, "MHA", "GatedLinearMHA"):
            make = bench.elsewhere if name == NANOGPT else lambda make, *arguments: make(*arguments)
            generate = make(bench.generation, args, name, batch)
            seconds = min(generate() for _ in range(3))
            tokens = batch * args.new_tokens
            yield f"{name}, batch {batch}", {"tokens/s": tokens / seconds, "ms per token": 1e3 * seconds / args.new_tokens}


def speed(args, steps, first):
    yield "training, 124M", steps_in_turn(args, steps, first)
    yield "generation, 124M", generation(args)


# ----------------------------------------------------------------------------------------------------------------------
# learning


def compare(args, name, steps, seeds, **knobs):
    """A comparison of LEARNING: the seconds that it took and {system: its runs}. Raises UserError."""
    knobs = dict(dataset=args.dataset, data_dir=args.data_dir, optimizer="muon", learning_rate=args.learning_rate,
                 min_lr=args.learning_rate / 10, log_interval=5, warmup_iters=steps // 10) | args.learner | knobs  # fmt: skip
    command = [sys.executable, "-m", "experiments.compare", name, "--out", args.out, "--steps", steps, "--seeds", *seeds]
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
        systems = json.load(file)["systems"]
    return time.monotonic() - began, {system: runs for system, by_rate in systems.items() for runs in by_rate.values()}


def losses(systems):
    for system, runs in systems.items():
        row = {f"loss, seed {i + 1}": run["validation"][-1][1] for i, run in enumerate(runs)}
        yield system, row | {"tokens/s beside the others": runs[0]["tokens_per_second"], "GB": runs[0]["memory_gb"]}


def learning(args):
    # a short comparison says how long one takes
    wall, systems = compare(args, "learning_short", 40, [0], eval_interval=40)
    yield f"learning, 40 steps, {wall:.0f} s", losses(systems)
    a_step = max(run["per_step"]["seconds"] for (run,) in systems.values())
    starting = wall - 40 * a_step
    steps = min(args.most_steps, int((left(args) / args.seeds - 1.2 * starting) / (1.1 * a_step)))
    if steps < 50:
        raise UserError(f"the time left is enough for {steps} steps only: give more --minutes")
    for n in range(1, args.seeds + 1):
        wall, systems = compare(args, "learning", steps, range(1, n + 1), eval_interval=-(-steps // 6))
        yield f"learning, {steps} steps, {n} seed(s), {wall:.0f} s", losses(systems)
    best = min(systems, key=lambda name: systems[name][0]["validation"][-1][1])
    command = [ROOT / "sample.py", f"--out_dir=out/learning/{best}-1", "--start=The", "--max_new_tokens=200", "--num_samples=2"]
    text = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    write(os.path.join(args.out, "sample.txt"), f"{best} after {steps} steps\n\n{text.stdout or text.stderr}")


# ----------------------------------------------------------------------------------------------------------------------


def left(args):
    """Seconds until the program is to end."""
    return max(0.0, args.end - time.monotonic())


def failed(error):
    return dict(right=False, error=(str(error) or type(error).__name__).splitlines()[0])


def keep(records, made_with, title, rows):
    """Make the rows of a table one by one, and keep each. An error ends the table and is its last row."""
    table = records.add(dict(title=title, made_with=made_with, rows={}))["rows"]
    began = time.monotonic()
    try:
        for name, row in rows:
            table[name] = row
            records.save()
    except Exception as error:
        table["error"] = failed(error)
    records.all[-1]["seconds"] = time.monotonic() - began
    records.save()
    columns = [*dict.fromkeys(key for row in table.values() for key in row)]
    cells = [
        [name, *(f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else v for c in columns)] for name, row in table.items()
    ]
    print(markdown([title, *columns], cells) + f"{records.all[-1]['seconds']:.0f} s\n", flush=True)


def main(arguments):
    parser = parser_with(__doc__, nanogpt=None, dtype="bfloat16")
    parser.add_argument("--parts", nargs="+", choices=("health", "speed", "learning"), default=["health", "speed", "learning"])
    parser.add_argument("--minutes", type=float, default=9, help="time for all of it")
    parser.add_argument("--rehearse", action="store_true", help="do it at toy size")
    parser.add_argument("--dataset", default="minipile", help="folder below --data_dir")
    parser.add_argument("--data_dir", default=str(ROOT / "data"))
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="of learning")
    parser.add_argument("--seeds", type=int, default=2, help="of learning")
    parser.add_argument("--out", default="results/gpu", help="folder of the results")
    args = parser.parse_args(arguments)
    if DEVICE == "cpu" and not args.rehearse:
        raise UserError(f"torch {torch.__version__} sees no CUDA card: --rehearse does the same at toy size on a CPU")
    args.end, args.out = time.monotonic() + 60 * args.minutes, os.path.abspath(args.out)
    args.small, args.learner, args.most_steps = (TOY, TOY_RUN, 60) if args.rehearse else (SMALL, GPT30M, 10**6)
    sizes = GPT124M | (dict(TOY, vocab_size=300, batch_size=2) if args.rehearse else {})
    timed = argparse.Namespace(**vars(args) | sizes, compile=True, steps=5, rounds=5, new_tokens=8 if args.rehearse else 128)
    records, made_with = Records(os.path.join(args.out, "card.json")), checkpoint.made_with(DEVICE)
    compiled = compiling(timed) if "speed" in args.parts else None  # beside the checks of health, which measure no time
    parts = dict(health=lambda: health(args), speed=lambda: speed(timed, *compiled), learning=lambda: learning(args))
    for part in args.parts:
        try:
            for title, rows in parts[part]():
                keep(records, made_with, title, rows)
        except UserError as error:
            print(f"{part}: {error}", flush=True)
        if part == "speed":
            compiled[0].clear()  # the processes end, and give their memory back


if __name__ == "__main__":
    cli(main)
