"""
Several systems, several seeds, one budget: runs of train.py, a table of their losses and costs, and a figure.

    python -m experiments.compare wikitext2 --config config/wikitext2.toml --seeds 1 2 3 --jobs 2 \\
        --systems MHA NagMHA "MomenMHA --beta=0.8" "MHA --match=YuriiFormer" -- --eval_interval=50
    python -m experiments.compare sweep --systems MHA NagMHA --learning_rates 1e-3 2e-3 4e-3 --tokens 2e6

A system is a variant, with overrides behind it; --match=SYSTEM among them sets the width that brings its number of
parameters nearest to that system's. What follows -- goes to every run. The budget is the same number of training steps
(the config's max_iters unless --budget says otherwise), of tokens, or of seconds: then a short run measures each system's
seconds a step, evaluations left out, and its schedule ends when the budget does. A rate of --learning_rates goes with a
min_lr in the config's proportion, and every system is shown at its best rate.

Runs live in out/NAME. Finished ones are not run again and interrupted ones go on, so the command can be stopped and
repeated. It writes NAME.md, .png and .json to --out; the last has the curves and all that the other two are made from.
"""

import datetime
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise

import torch
from tqdm import tqdm

import checkpoint
import train
from configurator import parse
from data import read_meta
from experiments.arguments import parser_with
from experiments.plot import enlarge_end, new_figure, read_metrics, save
from experiments.records import made, markdown, mean_sd, write
from guard import UserError, cli
from model import GPT, GPTConfig

UNITS = ("steps", "tokens", "seconds")


def count(cfg):
    """count_parameters() of a run's model."""
    vocab_size = cfg.vocab_size or read_meta(os.path.join(cfg.data_dir, cfg.dataset))["vocab_size"]
    with torch.device("meta"):
        return GPT(train.model_config(cfg, vocab_size=vocab_size)).count_parameters()


def matched(cfg, other):
    """
    The n_embd that brings cfg's number of parameters nearest to other's: with heads of a multiple of 8, which are fast, if such
    a width comes within 1%, otherwise of all.
    """
    n = sum(count(other).values())

    def size(width):
        return sum(count(replace(cfg, n_embd=width)).values())

    def nearest(step):
        widths = range(step, max(2 * step, 16 * other.n_embd), step)
        i = bisect(widths, n, key=size)
        return min(widths[max(0, i - 1) : i + 1], key=lambda width: abs(size(width) - n))

    even = nearest(8 * cfg.n_head)
    return even if abs(size(even) / n - 1) < 0.01 else nearest(cfg.n_head)


def command_of(system, common):
    """train.py's arguments for a system: the common ones, its variant and overrides, and the width if it is to match."""
    variant, *overrides = shlex.split(system)
    command = [*common, f"--variant={variant}", *(o for o in overrides if not o.startswith("--match="))]
    for other in (o.removeprefix("--match=") for o in overrides if o.startswith("--match=")):
        width = matched(*(parse(train.Config, c) for c in (command, command_of(other, common))))
        command.append(f"--n_embd={width}")
    return command


def tokens_per_step(cfg):
    return cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def progress(folder, cfg):
    """
    Steps that folder's checkpoint has of just this run; None if it has none or is another's. A knob that train.py did not
    have when it was written counts as at its default, and init_from as asked for if the run was resumed.
    """
    path = os.path.join(folder, "ckpt.pt")
    if not os.path.exists(path):
        return None
    state = checkpoint.load(path)
    there = asdict(train.Config(variant=cfg.variant)) | state["config"]
    if there["init_from"] == "resume":
        there["init_from"] = cfg.init_from
    return state["step"] if there == asdict(cfg) else None


def diverged(folder):
    """Whether train.py gave the run up because its loss wasn't finite, or on a spike."""
    path = os.path.join(folder, "metrics.jsonl")
    return os.path.exists(path) and "stopped" in read_metrics(path)[-1]


def run(command, folder, threads):
    """One run of train.py in a process of its own, or what is left of it; its output in FOLDER.log. Raises UserError."""
    cfg = parse(train.Config, command)
    step = progress(folder, cfg)
    if step == cfg.max_iters or (step is not None and diverged(folder)):
        return
    resume = [] if step is None else ["--init_from=resume"]
    with open(f"{folder}.log", "a" if resume else "w") as log:
        done = subprocess.run([sys.executable, train.__file__, *command, *resume], stdout=log, stderr=log,
                              env=os.environ | dict(OMP_NUM_THREADS=str(threads)))  # fmt: skip
    if progress(folder, cfg) != cfg.max_iters and not (done.returncode and diverged(folder)):
        raise UserError(f"the run failed or was stopped, see {folder}.log: python train.py {shlex.join(command)}")


def run_all(commands, jobs):
    """Runs, {folder: command}, so many at a time. Raises UserError, for all commands before the first run."""
    for folder, command in commands.items():
        parse(train.Config, command)
        os.makedirs(os.path.dirname(folder), exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(run, command, folder, threads) for folder, command in commands.items()]
        try:
            for done in tqdm(work, unit="run", disable=None):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def speed(records):
    """Tokens a second: the median over a run's logged steps."""
    return statistics.median(r["tokens_per_second"] for r in records if "tokens_per_second" in r)


def spike(records):
    """The largest ratio of a training loss to the mean of the ten before it."""
    losses = [r["train_loss"] for r in records if "train_loss" in r]
    return max((loss / statistics.mean(losses[i - 10 : i]) for i, loss in enumerate(losses) if i >= 10), default=float("nan"))


def read_run(command):
    """What the table and the figure need of a finished run, as plain values."""
    cfg = parse(train.Config, command)
    records, path = read_metrics(cfg.out_dir), os.path.join(cfg.out_dir, "ckpt.pt")
    state = checkpoint.load(path)
    config = GPTConfig(**state["model_config"])
    validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if diverged(cfg.out_dir):
        validation.append((cfg.max_iters, math.inf))
    return state.get("made_with", {}) | dict(
        command=shlex.join(["python", "train.py", *command]),
        date=datetime.date.fromtimestamp(os.path.getmtime(path)).isoformat(),
        steps=cfg.max_iters,
        per_step=dict(steps=1, tokens=tokens_per_step(cfg), seconds=tokens_per_step(cfg) / speed(records)),
        tokens_per_second=speed(records),
        memory_gb=max(r["memory_gb"] for r in records if "memory_gb" in r),
        spike=spike(records),
        n_embd=config.n_embd,
        parameters=count(config),
        training=[(r["step"], r["train_loss"]) for r in records if "train_loss" in r],
        validation=validation,
    )


def final(runs):
    """Their last validation losses."""
    return [run["validation"][-1][1] for run in runs]


def best_rate(by_rate):
    """Of {rate: runs} the rate with the least mean final loss; that of a run that diverged is infinite."""
    return min(by_rate, key=lambda rate: statistics.mean(final(by_rate[rate])))


def curve(runs, kind, unit):
    """[(x, mean, sd), ...] over a system's runs; kind: training or validation; x in steps, tokens or seconds of training."""
    scale = statistics.mean(run["per_step"][unit] for run in runs)
    points = [list(zip(*at, strict=True)) for at in zip(*(run[kind] for run in runs), strict=True)]
    return [(x[0] * scale, statistics.mean(y), statistics.stdev(y) if len(y) > 1 else 0.0) for x, y in points]


def reach(points, target):
    """Where the line through [(x, loss, ...), ...] first comes down to target; None if it doesn't."""
    for (a, u, *_), (b, w, *_) in pairwise(points):
        if u <= target:
            return a
        if w <= target:
            return a + (b - a) * (u - target) / (u - w)


def p_value(losses, base):
    """Of the two-sided paired t-test: could the mean difference of the seeds be chance? None for a single seed."""
    from scipy.stats import ttest_rel

    return ttest_rel(losses, base).pvalue.item() if len(losses) > 1 else None


def at_best(data):
    """{system: its runs at its best rate}. data: what NAME.json holds. Raises UserError if a system diverged at all rates."""
    best = {system: rates[best_rate(rates)] for system, rates in data["systems"].items()}
    if lost := [system for system, runs in best.items() if math.inf in final(runs)]:
        raise UserError(f"{', '.join(lost)} diverged at every learning rate: lower them")
    return best


NOTES = """
To {base}'s loss: where a system's mean validation curve, linear between evaluations, first comes down to {base}'s final
mean. Tokens/s: median over logged steps, {jobs} run(s) at a time. GB: peak memory. Spike: the largest ratio of a training
loss to the mean of the ten logged before it. The last three columns are numbers of parameters.

p: two-sided paired t-test over the seeds, n = {n}, not corrected for the number of systems. So few seeds have little power:
a large p does not say that two systems are equal. There is no p where a rate was chosen by these same losses.

"""


def report(data):
    """The text of NAME.md."""
    cfg, unit, systems = data["config"], data["budget"][0], at_best(data)
    rates, every = data["learning_rates"], [run for runs in systems.values() for run in runs]
    seeds, (base, of_base) = ", ".join(map(str, data["seeds"])), next(iter(systems.items()))
    head = ["system", "loss", f"minus {base}'s, seed by seed", "p", "steps", f"{unit} to {base}'s loss", "tokens/s", "GB"]
    rows = []
    for system, runs in systems.items():
        first, losses = runs[0], final(runs)
        p = p_value(losses, final(of_base)) if len(rates) == 1 else None  # the rates were chosen by these losses
        differences = [a - b for a, b in zip(losses, final(of_base), strict=True)]
        at = reach(curve(runs, "validation", unit), curve(of_base, "validation", unit)[-1][1])
        rows.append([
            system + f", width {first['n_embd']}" * ("--match" in system)
            + f", rate {best_rate(data['systems'][system])}" * (len(rates) > 1), mean_sd(losses),
            *(("", "") if system == base else (mean_sd(differences, "+.4f"), "" if p is None else f"{p:.2g}")),
            f"{first['steps']:,}", "not reached" if at is None else f"{at:,.0f}",
            f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f}",
            f"{max(run['memory_gb'] for run in runs):.2f}", f"{max(run['spike'] for run in runs):.2f}".replace("nan", ""),
            *(f"{number:,}" for number in first["parameters"].values()),
        ])  # fmt: skip
    budget = of_base[0]["steps"] * of_base[0]["per_step"][unit]
    text = (
        f"`{data['command']}`\n\n"
        f"Validation loss in nats per token of {cfg['dataset']} after {budget:,.0f} {unit} of training, mean ±\n"
        f"standard deviation over seeds {seeds}. {cfg['n_layer']} layers, width {cfg['n_embd']}, context {cfg['block_size']}, "
        f"{of_base[0]['per_step']['tokens']:,} tokens a step.\n\n"
        + markdown([*head, "spike", "embedding", "layers", "scalars"], rows)
        + NOTES.format(base=base, n=len(data["seeds"]), jobs=data["jobs"])
    )
    if len(rates) > 1:
        losses = [[rate, *(mean_sd(final(tried[rate])) for tried in data["systems"].values())] for rate in rates]
        text += f"Of {len(rates)} learning rates each system has its best above, chosen by the mean of these same losses:\n\n"
        text += markdown(["rate", *systems], losses) + "\n"
    dates = [run["date"] for run in every]
    return text + f"Made {min(dates)} to {max(dates)}: {made(every)}.\n"


def draw(data, path):
    """Training and validation loss of every system, in the manner of Figure 1 of [Ren] (arXiv 2511.00907)."""
    fig, axes = new_figure(2)
    unit, seeds = data["budget"][0], ", ".join(map(str, data["seeds"]))
    for ax, kind in zip(axes, ("training", "validation"), strict=True):
        enlarge_end(ax, {system: curve(runs, kind, unit) for system, runs in at_best(data).items()})
        ax.set(xlabel=f"{unit} of training", ylabel="nats per token", title=f"{kind} loss")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle(f"{data['config']['dataset']}, {data['budget'][1]:,.0f} {unit}: mean ± sd over seeds {seeds}", fontsize=10)
    save(fig, path)


def main(arguments):
    shared = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = parser_with(__doc__, seeds=[1, 2])
    parser.add_argument("name", help="of the comparison")
    parser.add_argument(
        "--systems", nargs="+", required=True, help='variants, or "VARIANT --override=value"; the first is the base'
    )
    parser.add_argument("--config", default="config/demo.toml")
    budget = parser.add_mutually_exclusive_group()
    for unit in UNITS:
        budget.add_argument(f"--{unit}", type=float, help=f"{unit} of training, the same for every system")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="rates to try with every system")
    parser.add_argument("--out", default="results", help="folder of NAME.md, .png and .json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores")
    args = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)

    def folder(*words):
        return os.path.join("out", args.name, "-".join(words).replace(" --", "_").replace("/", "_"))

    # the budget, as every system's number of steps
    commands = {system: command_of(system, [args.config, *shared]) for system in args.systems}
    value, unit = next(((v, u) for u in UNITS if (v := getattr(args, u)) is not None), (None, "steps"))
    if value is not None:
        if value <= 0:
            raise UserError(f"--{unit} {value:g} must be positive")
        if unit == "seconds":
            short = ["--max_iters=50", "--eval_interval=50", "--eval_iters=1", "--log_interval=10"]
            timed = {system: folder(system, "timed") for system in commands}
            run_all({timed[s]: [*command, *short, f"--out_dir={timed[s]}"] for s, command in commands.items()}, args.jobs)
        for system, command in commands.items():
            tokens = tokens_per_step(parse(train.Config, command))
            a_step = 1 if unit == "steps" else tokens if unit == "tokens" else tokens / speed(read_metrics(timed[system]))
            command += [f"--max_iters={max(1, round(value / a_step))}", "--lr_decay_iters=None"]

    # the runs
    if len({cfg.eval_iters * cfg.batch_size for cfg in (parse(train.Config, command) for command in commands.values())}) > 1:
        raise UserError("the systems evaluate on different windows: let eval_iters * batch_size be the same for all")
    systems, work = {}, {}
    for system, command in commands.items():
        cfg = parse(train.Config, command)
        for rate in args.learning_rates or [cfg.learning_rate]:
            same = rate == cfg.learning_rate
            flags = [] if same else [f"--learning_rate={rate}", f"--min_lr={cfg.min_lr * rate / cfg.learning_rate}"]
            for seed in args.seeds:
                out_dir = folder(" ".join([system, *flags[:1]]), str(seed))
                work[out_dir] = [*command, *flags, f"--seed={seed}", f"--out_dir={out_dir}"]
                systems.setdefault(system, {}).setdefault(str(rate), []).append(out_dir)
    run_all(work, args.jobs)

    # the results
    first = parse(train.Config, next(iter(work.values())))
    data = dict(
        command=f"python -m experiments.compare {shlex.join(arguments)}",
        seeds=args.seeds,
        jobs=args.jobs,
        budget=(unit, value or first.max_iters),
        learning_rates=list(systems[args.systems[0]]),
        config=asdict(first),
        systems={system: {rate: [read_run(work[f]) for f in of_seeds] for rate, of_seeds in rates.items()}
                 for system, rates in systems.items()},
    )  # fmt: skip
    result = os.path.join(args.out, args.name)
    write(f"{result}.json", json.dumps(data) + "\n")
    write(f"{result}.md", report(data))
    print(report(data))
    draw(data, f"{result}.png")


if __name__ == "__main__":
    cli(main)
