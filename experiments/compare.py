"""
Several systems, several seeds, one budget: runs of train.py, a table of their final losses and a figure.

    python -m experiments.compare wikitext2 --config config/wikitext2.toml --seeds 1 2 \\
        --systems MHA NagMHA "MomenMHA --beta=0.8" --jobs 2 -- --max_iters=600

A system is a variant, with overrides behind it; what follows -- goes to every run. Runs live in out/NAME; finished ones
are not run again, so the command can be stopped and repeated. The table and figure go to results/NAME.md and .png.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from tqdm import tqdm

import checkpoint
import train
from configurator import UserError, cli, parse
from experiments.plot import new_figure, read_metrics, save
from model import GPT, GPTConfig


def run(command, folder, threads):
    """One run of train.py in a process of its own, its output in FOLDER.log, unless it has finished before."""
    cfg = parse(train.Config, command)
    ckpt = os.path.join(folder, "ckpt.pt")
    if os.path.exists(ckpt):
        state = checkpoint.load(ckpt)
        if state["config"] == asdict(cfg) and state["step"] == cfg.max_iters:
            return
    with open(f"{folder}.log", "w") as log:
        done = subprocess.run([sys.executable, train.__file__, *command], stdout=log, stderr=log,
                              env=os.environ | dict(OMP_NUM_THREADS=str(threads)))  # fmt: skip
    if done.returncode:
        raise UserError(f"the run failed, see {folder}.log: python train.py {' '.join(command)}")


def spike(records):
    """The largest ratio of a training loss to the mean of the ten before it."""
    losses = [r["train_loss"] for r in records if "train_loss" in r]
    return max((loss / statistics.mean(losses[i - 10 : i]) for i, loss in enumerate(losses) if i >= 10), default=float("nan"))


def mean_sd(values):
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def draw(runs, title, path):
    """Validation loss by step, a line a system with the range over its runs; runs: {system: [records of a run, ...]}."""
    fig, ax = new_figure()
    for i, (system, seeds) in enumerate(runs.items()):
        curves = [{r["step"]: r["val_loss"] for r in records if "val_loss" in r and r["step"]} for records in seeds]
        losses = {step: [curve[step] for curve in curves] for step in curves[0]}
        style = dict(color=f"C{i % 10}", ls=("-", "--")[i // 10 % 2])
        ax.plot(losses.keys(), [statistics.mean(v) for v in losses.values()], marker="o", ms=3, label=system, **style)
        ax.fill_between(losses.keys(), [min(v) for v in losses.values()], [max(v) for v in losses.values()],
                        alpha=0.15, color=style["color"], lw=0)  # fmt: skip
    ax.set(xlabel="training step", ylabel="validation loss (nats per token)", title=title)
    ax.legend(frameon=False, fontsize=7, ncols=2)
    save(fig, path)


def main(arguments):
    shared = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the comparison")
    parser.add_argument(
        "--systems", nargs="+", required=True, help='variants, or "VARIANT --override=value"; the first is the base'
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--config", default="config/demo.toml")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores")
    args = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)

    folders, commands = {}, {}
    for system in args.systems:
        for seed in args.seeds:
            folder = os.path.join("out", args.name, f"{system.replace(' --', '_')}-{seed}")
            folders[system, seed] = folder
            flags = [f"--variant={system.split()[0]}", *shlex.split(system)[1:], f"--seed={seed}", f"--out_dir={folder}"]
            commands[folder] = [args.config, *shared, *flags]
            parse(train.Config, commands[folder])  # complain before the first run, not after the last but one
    os.makedirs(os.path.join("out", args.name), exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        threads = max(1, torch.get_num_threads() // args.jobs)
        work = [pool.submit(run, command, folder, threads) for folder, command in commands.items()]
        try:
            for done in tqdm(work, unit="run", disable=None):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    metrics = {key: read_metrics(folder) for key, folder in folders.items()}
    final = {key: [r["val_loss"] for r in records if "val_loss" in r][-1] for key, records in metrics.items()}
    cfg = parse(train.Config, commands[folder])
    base, seeds = args.systems[0], ", ".join(map(str, args.seeds))
    lines = [
        f"`python -m experiments.compare {shlex.join(arguments)}`\n",
        f"Validation loss in nats per token after {cfg.max_iters:,} steps, {metrics[base, args.seeds[0]][-1]['tokens']:,} "
        f"tokens, of {cfg.dataset}; mean ± standard deviation over seeds {seeds}. {cfg.n_layer} layers, width {cfg.n_embd}, "
        f"context {cfg.block_size}; torch {torch.__version__}. Spike: the largest ratio of a training loss to the mean of "
        "the ten logged before it.\n",
        f"| system | loss | minus {base}'s, seed by seed | spike | embedding | layers | scalars |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for system in args.systems:
        losses = [final[system, seed] for seed in args.seeds]
        differences = [final[system, seed] - final[base, seed] for seed in args.seeds]
        config = checkpoint.load(os.path.join(folders[system, args.seeds[0]], "ckpt.pt"))["model_config"]
        with torch.device("meta"):
            counts = GPT(GPTConfig(**config)).count_parameters().values()
        worst = max(spike(metrics[system, seed]) for seed in args.seeds)
        cells = [system, mean_sd(losses), mean_sd(differences), f"{worst:.2f}", *(f"{n:,}" for n in counts)]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    os.makedirs("results", exist_ok=True)
    with open(f"results/{args.name}.md", "w") as file:
        file.write(text)
    print(text)

    draw({system: [metrics[system, seed] for seed in args.seeds] for system in args.systems},
         f"{cfg.dataset}, mean and range of seeds {seeds}", f"results/{args.name}.png")  # fmt: skip


if __name__ == "__main__":
    cli(main)
