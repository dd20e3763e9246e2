"""
What each variant costs: time of a training step over MHA's, and the memory that reversible layers save.

    python -m experiments.bench steps --variants MHA NagMHA MHA2nd1st LightMHA2nd1st --block_size 1024 --batch_size 4
    python -m experiments.bench memory

Steps of all variants alternate in one process and are compared by their medians, since times on a busy machine
wander together. Peak memory is that of a process of its own for each depth.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time

import torch

from configurator import UserError, cli
from experiments.plot import new_figure, save
from model import GPT, VARIANTS, GPTConfig


def training_step(args, **choices):
    """A function that takes one training step (forward, backward, AdamW) on random tokens; it returns nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = {k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    model = GPT(GPTConfig(bias=False, **sizes | choices)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    running = torch.compile(model) if args.compile else model
    idx = torch.randint(args.vocab_size, (args.batch_size, args.block_size), device=device)

    def step(idx=idx):
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = running(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=args.what == "steps")
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def steps(args):
    """Median seconds of a step for each variant, and the ratio to the first's."""
    if unknown := set(args.variants) - set(VARIANTS):
        raise UserError(f"no variant is named {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    torch._dynamo.config.recompile_limit = 8 * len(args.variants)  # all of them share the code of one forward
    running = {variant: training_step(args, variant=variant) for variant in args.variants}
    for step in running.values():  # compile, warm up
        step(), step()
    times = {variant: [] for variant in running}
    for _ in range(args.rounds):
        for variant, step in running.items():
            times[variant].append(seconds(step))
    medians = {variant: statistics.median(t) for variant, t in times.items()}
    base = medians[args.variants[0]]
    print(f"| variant | s a step | over {args.variants[0]} |\n|---|--:|--:|")
    for variant, median in medians.items():
        print(f"| `{variant}` | {median:.3f} | {median / base:.2f} |")
    return {variant: dict(seconds=median, ratio=median / base) for variant, median in medians.items()}


def peak(args, choices, connection):
    """In a process of its own: MB that a training step takes beyond weights, gradients and optimizer state."""
    step = training_step(args, **choices)
    step(torch.zeros(1, 2, dtype=torch.long, device="cuda" if torch.cuda.is_available() else "cpu"))  # makes all of these
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        connection.send((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


def memory(args):
    """Peak MB of activations by depth, for polyak on both sublayers, plain and reversible; a figure beside --out."""
    context, result = multiprocessing.get_context("spawn"), {}
    for reversible in (False, True):
        for n_layer in args.depths:
            choices = dict(momentum="polyak", momentum_on="both", beta=0.9, reversible=reversible, n_layer=n_layer)
            here, there = context.Pipe()
            process = context.Process(target=peak, args=(args, choices, there))
            process.start()
            result.setdefault("reversible" if reversible else "plain", {})[n_layer] = here.recv()
            process.join()
    fig, ax = new_figure()
    for name, points in result.items():
        ax.plot(points.keys(), points.values(), marker="o", label=name)
        print(name, {n: round(mb) for n, mb in points.items()})
    ax.set(xlabel="layers", ylabel="peak activation memory of a step (MB)", ylim=0, xticks=args.depths)
    ax.set_title(f"width {args.n_embd}, {args.batch_size} x {args.block_size} tokens", fontsize=10)
    ax.legend(frameon=False)
    save(fig, os.path.splitext(args.out)[0] + "_memory.png")
    return result


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "memory"))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 12, 24, 48])
    for size, value in dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=257, batch_size=16, rounds=9).items():
        parser.add_argument(f"--{size}", type=int, default=value)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="results/bench.jsonl", help="JSON that the result is added to")
    args = parser.parse_args(arguments)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    result = dict(what=args.what, arguments=vars(args), result=dict(steps=steps, memory=memory)[args.what](args))
    with open(args.out, "a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    cli(main)
