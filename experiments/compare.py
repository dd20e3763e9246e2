"""
Several systems, several seeds, one budget: runs of train.py, a table of their losses and costs, and a figure.

    python -m experiments.compare wikitext2 --config config/wikitext2.toml --seeds 1 2 3 --jobs 2 \\
        --systems MHA NagMHA "MomenMHA --beta=0.8" "MHA --match=YuriiFormer" -- --eval_interval=50
    python -m experiments.compare fair --systems MHA NagMHA --learning_rates 2e-3 4e-3 8e-3 --seeds 1 2 3 --tokens 2e6

A system is a variant, with overrides behind it; --match=SYSTEM among them sets the width that brings its number of
parameters nearest to that system's. What follows -- goes to every run. All systems have one budget: the config's max_iters, or
so many --steps, --tokens, --seconds or oracle --calls. With one of these four the learning rate's schedule ends when the budget
does. An oracle call: a forward pass asks one attention or MLP for a direction. A step counts as one pass, whatever its batch.

With --learning_rates each system takes the rate that is best for it. Each rate gets one run that decides this, with
--tuning_seed and the whole budget. A --tuning_share below 1 costs less, but often chooses too high a rate (results/README.md).
The seeds of the table decide nothing. min_lr keeps its ratio to the rate.
With --grow a system whose best rate is its lowest or highest also tries the next one, until its best has one on either side.

Runs live in out/NAME. Finished ones do not run again and interrupted ones go on, so you can stop the command and repeat it.
A few steps of each system alone measure its speed. The command writes NAME.md, .png and .json to --out; the last has the
curves and all that the other two are made from. --reuse results/NAME.json takes from there the runs that have the same
configuration and the same data, so you can add a system to a table and train nothing else. See to it that code and machine are
the same: the table names both, but nothing compares them.
"""

import datetime
import itertools
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

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import train
from configurator import parse
from data import fingerprint, read_meta
from experiments.arguments import parser_with
from experiments.plot import bands, enlarge_end, line, plt, read_metrics, save
from experiments.records import made, markdown, mean_sd, write
from guard import UserError, cli
from model import GPT, GPTConfig

UNITS = dict(steps="steps", tokens="tokens", seconds="seconds", calls="oracle calls")


def meta_of(cfg):
    """The meta.json of a run's text."""
    return read_meta(os.path.join(cfg.data_dir, cfg.dataset))


def model_of(cfg):
    """The GPTConfig of a run's model: weights that it starts from bring their own sizes."""
    meta = meta_of(cfg)
    config = train.model_config(cfg, vocab_size=cfg.vocab_size or meta["vocab_size"])
    return config if cfg.init_from == "scratch" else checkpoint.donated(cfg, config, meta["tokenizer"])[0]


def count(config):
    """count_parameters() of a GPTConfig's model."""
    with torch.device("meta"):
        return GPT(config).count_parameters()


def matched(cfg, other):
    """
    The n_embd that brings cfg's number of parameters nearest to other's. Heads whose width is a multiple of 8 are fast: if an
    n_embd with such heads comes within 1%, only these count; otherwise all that n_head (and llama's pairs) allow.
    """
    n = sum(count(model_of(other)).values())

    def size(width):
        return sum(count(model_of(replace(cfg, n_embd=width))).values())

    def nearest(step):
        widths = range(step, max(2 * step, 16 * other.n_embd), step)
        i = bisect(widths, n, key=size)
        return min(widths[max(0, i - 1) : i + 1], key=lambda width: abs(size(width) - n))

    even = nearest(8 * cfg.n_head)
    return even if abs(size(even) / n - 1) < 0.01 else nearest(cfg.n_head * (2 if cfg.backbone == "llama" else 1))


def command_of(system, common):
    """train.py's arguments for a system: the common ones, its variant and overrides, and the width if it is to match."""
    variant, *overrides = shlex.split(system)
    command = [*common, f"--variant={variant}", *(o for o in overrides if not o.startswith("--match="))]
    for other in (o.removeprefix("--match=") for o in overrides if o.startswith("--match=")):
        width = matched(*(parse(train.Config, c) for c in (command, command_of(other, common))))
        command.append(f"--n_embd={width}")
    return command


def identity(cfg, data):
    """What makes a run this run, and not where it lives: its configuration, and its data's fingerprint."""
    elsewhere = "out_dir", "data_dir", "overwrite"
    return {name: value for name, value in asdict(cfg).items() if name not in elsewhere} | dict(data=data)


def progress(folder, cfg):
    """
    The steps of just this run that folder's checkpoint has; None if there is none, or if it is of another run, also one on
    other text. A knob that an older train.py did not have counts as what that version did. If the run was resumed, init_from
    counts as asked for.
    """
    path = os.path.join(folder, "ckpt.pt")
    if not os.path.exists(path):
        return None
    state = checkpoint.load(path)
    meant = {name: value for name, value in state["model_config"].items() if name not in ("vocab_size", *state["config"])}
    there = asdict(train.Config(variant=cfg.variant)) | meant | state["config"]
    if there["init_from"] == "resume":
        there["init_from"] = cfg.init_from
    return state["step"] if there == asdict(cfg) and state.get("data") == fingerprint(meta_of(cfg)) else None


def diverged(folder):
    """Whether train.py gave the run up because its loss wasn't finite, or on a spike."""
    path = os.path.join(folder, "metrics.jsonl")
    return os.path.exists(path) and "stopped" in (read_metrics(path) or [{}])[-1]


def run(command, folder, threads):
    """One run of train.py in a process of its own, or the rest of it; its output goes to FOLDER.log. Raises UserError."""
    cfg = parse(train.Config, command)
    step = progress(folder, cfg)
    if step == cfg.max_iters or (step is not None and diverged(folder)):
        return
    resume = [] if step is None else ["--init_from=resume"]
    with open(f"{folder}.log", "a" if resume else "w") as log:
        done = subprocess.run([sys.executable, train.__file__, *command, *resume], stdout=log, stderr=log,
                              env=os.environ | dict(OMP_NUM_THREADS=str(threads)))  # fmt: skip
    step = progress(folder, cfg)
    if step != cfg.max_iters and (step is None or not done.returncode or not diverged(folder)):
        raise UserError(f"the run failed or was stopped, see {folder}.log: python train.py {shlex.join(command)}")


def run_all(commands, jobs):
    """Run all of {folder: command}, `jobs` at a time. Raises UserError; for a wrong command, before the first run."""
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
    """Tokens per second: the median over a run's logged steps."""
    return statistics.median(r["tokens_per_second"] for r in records if "tokens_per_second" in r)


def spike(records):
    """The largest ratio of a training loss to the mean of the ten before it."""
    losses = [r["train_loss"] for r in records if "train_loss" in r]
    return max((loss / statistics.mean(losses[i - 10 : i]) for i, loss in enumerate(losses) if i >= 10), default=float("nan"))


def read_run(command):
    """What table and figure need of a finished run, as plain values."""
    cfg = parse(train.Config, command)
    records, path = read_metrics(cfg.out_dir), os.path.join(cfg.out_dir, "ckpt.pt")
    state = checkpoint.load(path)
    config = GPTConfig(**state["model_config"])
    validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if diverged(cfg.out_dir):
        validation.append((cfg.max_iters, math.inf))
    return state.get("made_with", {}) | dict(
        command=shlex.join(["python", "train.py", *command]),
        config=identity(cfg, state["data"]),
        date=datetime.date.fromtimestamp(os.path.getmtime(path)).isoformat(),
        steps=cfg.max_iters,
        tokens_per_second=speed(records),
        memory_gb=max(r["memory_gb"] for r in records if "memory_gb" in r),
        spike=spike(records),
        n_embd=config.n_embd,
        backbone=config.backbone,
        qk_norm=config.qk_norm,
        parameters=count(config),
        training=[(r["step"], r["train_loss"]) for r in records if "train_loss" in r],
        validation=validation,
    )


def read_runs(path):
    """The runs in the .json of a comparison, those that chose rates among them. Raises UserError."""
    try:
        with open(path) as file:
            systems = json.load(file)["systems"]
        runs = [run for s in systems.values() for run in (*s["runs"], *s["tuning"].values())]
        return [run for run in runs if run["config"]]  # older versions kept none: a KeyError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"is not the .json of a comparison, or is an older version's, which lacks what is needed ({error!r})"
        raise UserError(f"--reuse {path} {reason}") from None


def outcomes(commands, known, jobs):
    """{folder: the record of its run} for {folder: command}: one of those known, or what a run here gives. Raises UserError."""
    same = {}
    for folder, command in commands.items():
        cfg = parse(train.Config, command)
        wanted = identity(cfg, fingerprint(meta_of(cfg)))
        defaults = asdict(train.Config(variant=cfg.variant))  # for a knob that is newer than the table
        if found := [run for run in known if wanted.items() <= (defaults | run["config"]).items()]:
            same[folder] = found[0]
    if known:
        print(f"--reuse has {len(same)} of these {len(commands)} runs")
    run_all({folder: command for folder, command in commands.items() if folder not in same}, jobs)
    return {folder: same.get(folder) or read_run(command) for folder, command in commands.items()}


def final(runs):
    """The last validation loss of each run."""
    return [run["validation"][-1][1] for run in runs]


def oracle_calls(config):
    """How often a forward pass of a GPTConfig's model asks an attention or MLP for a direction. An inner step counts as one."""
    with torch.device("meta"):
        model, asked = GPT(replace(config, reversible=False)), []
        for block in model.transformer.h:
            for oracle in (block.attn, block.mlp):
                oracle.register_forward_hook(lambda *_: asked.append(config.inner_steps))
        model(torch.zeros(1, 1, dtype=torch.long))
    return sum(asked)


def lost(runs):
    """Whether one of them diverged: then there is no mean."""
    return math.inf in final(runs)


def curve(system, kind, unit, base=None):
    """
    [(x, mean, sd), ...] of the losses of a system's runs or, if there is a base, of the losses minus the base's, seed by seed.
    kind: training or validation; unit: of x, one of UNITS.
    """
    points = []
    for at in zip(*(run[kind] for run in system["runs"]), strict=True):
        x, losses = at[0][0] * system["per_step"][unit], [loss for _, loss in at]
        if base:
            theirs = [np.interp(x, *(np.array(run[kind]) * (base["per_step"][unit], 1)).T) for run in base["runs"]]
            losses = [float(loss - other) for loss, other in zip(losses, theirs, strict=True)]
        points.append((x, statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return points


def reach(points, target):
    """Where the line through [(x, loss, ...), ...] first comes down to target; None if it doesn't."""
    for (a, u, *_), (b, w, *_) in itertools.pairwise(points):
        if u <= target:
            return a
        if w <= target:
            return a + (b - a) * (u - target) / (u - w)


def paired(losses, base):
    """
    For losses minus base's, seed by seed: their mean, its 95% interval as a pair, and the p of the two-sided t-test: could the
    mean be chance? With a single seed the last two are None; with runs that diverged all three are None.
    """
    from scipy.stats import ttest_rel

    if math.inf in (*losses, *base):
        return None, None, None
    mean = statistics.mean(a - b for a, b in zip(losses, base, strict=True))
    if len(losses) == 1:
        return mean, None, None
    test = ttest_rel(losses, base)
    if math.isnan(test.pvalue):  # every loss equals base's
        return mean, None, None
    return mean, tuple(map(float, test.confidence_interval(0.95))), float(test.pvalue)


def holm(ps):
    """Holm's correction of {name: p or None}: of k tests p_i, the i-th smallest, becomes max over j <= i of (k - j + 1) p_j."""
    corrected, least = dict.fromkeys(ps), 0.0
    known = sorted((name for name, p in ps.items() if p is not None), key=ps.get)
    for i, name in enumerate(known):
        corrected[name] = least = max(least, min(1.0, (len(known) - i) * ps[name]))
    return corrected


NOTES = """
Loss: mean ± standard deviation over the seeds. Minus {base}'s: mean of the differences seed by seed, and its 95% interval
by the paired t-test. p: that of the two-sided test, n = {n}, after Holm's correction over the systems of this table. With few
seeds the test has little power: a large p does not say that two systems are equal.

To {base}'s loss: where a system's mean validation curve, linear between evaluations, first comes down to {base}'s final
mean. Oracle calls: of attention or MLP, in one forward pass for each step. Seconds: of the training steps of one run, at
the speed of a few steps measured alone. GB: peak memory. Spike: the largest ratio of a training loss to the mean of the ten
logged before it. The last three columns are numbers of parameters.

"""


def report(data):
    """The text of NAME.md."""
    cfg, (unit, budget), systems = data["config"], data["budget"], data["systems"]
    base, first = next(iter(systems.items()))
    of_base, tuned = first["runs"], len(first["tuning"]) > 0
    against = {name: paired(final(s["runs"]), final(of_base)) for name, s in systems.items() if name != base}
    corrected = holm({name: p for name, (_, _, p) in against.items()})
    head = f"system|loss|minus {base}'s|p|tokens|oracle calls|seconds|{UNITS[unit]} to {base}'s loss|GB|spike"
    head += "|embedding|layers|scalars"
    rows, backbones = [], {run["backbone"] for s in systems.values() for run in s["runs"]}
    for name, s in systems.items():
        runs, (difference, interval, _) = s["runs"], against.get(name, (None, None, None))
        at = None if lost(runs) else reach(curve(s, "validation", unit), curve(first, "validation", unit)[-1][1])
        total = {u: runs[0]["steps"] * cost for u, cost in s["per_step"].items()}
        rows.append([
            name + f", {runs[0]['backbone']}" * (len(backbones) > 1) + f", width {runs[0]['n_embd']}" * ("--match" in name)
            + f", rate {s['rate']}" * tuned,
            mean_sd(final(runs)),
            "" if difference is None else f"{difference:+.4f}" + (" [{:+.4f}, {:+.4f}]".format(*interval) if interval else ""),
            "" if corrected.get(name) is None else f"{corrected[name]:.2g}",
            f"{total['tokens']:,}", f"{total['calls']:,}", f"{total['seconds']:,.0f}".replace("nan", ""),
            "not reached" if at is None else f"{at:,.0f}",
            f"{max(run['memory_gb'] for run in runs):.2f}", f"{max(run['spike'] for run in runs):.2f}".replace("nan", ""),
            *(f"{number:,}" for number in runs[0]["parameters"].values()),
        ])  # fmt: skip
    every = [run for s in systems.values() for run in s["runs"]]
    text = (
        f"`{data['command']}`\n\n"
        f"Validation loss in nats per token of {cfg['dataset']} after {budget:,.0f} {UNITS[unit]} of training, over seeds "
        f"{', '.join(map(str, data['seeds']))}.\n{cfg['n_layer']} layers, width {cfg['n_embd']}, context {cfg['block_size']}, "
        f"{first['per_step']['tokens']:,} tokens per step, optimizer {cfg['optimizer']}, backbone "
        f"{' or '.join(sorted(backbones))}, qk_norm {' or '.join(sorted({str(run['qk_norm']) for run in every}))}.\n\n"
        + markdown(head.split("|"), rows)
        + NOTES.format(base=base, n=len(data["seeds"]))
    )
    if tuned:
        tried = [{rate: mean_sd(final([run])) for rate, run in s["tuning"].items()} for s in systems.values()]
        losses = [[rate, *(t.get(rate, "") for t in tried)] for rate in sorted({rate for t in tried for rate in t}, key=float)]
        text += f"The rate of each system is the best of these, by a run of seed {data['tuning_seed']} and "
        text += "the whole" if data["tuning_share"] == 1 else f"{data['tuning_share']:g} of the"
        text += " budget:\n\n" + markdown(["rate", *systems], losses) + "\n"
        every += [run for s in systems.values() for run in s["tuning"].values()]
    dates = [run["date"] for run in every]
    return text + f"Made {min(dates)} to {max(dates)}: {made(every)}.\n"


def draw(data, path):
    """
    Three panels, of the systems that did not diverge: the validation loss; that loss minus the first system's, which shows what
    the curves hide; below, this difference at the end with its 95% interval. The lowest panel is the legend too.
    """
    (unit, budget), systems = data["budget"], {name: s for name, s in data["systems"].items() if not lost(s["runs"])}
    base, first = next(iter(systems.items()))
    heights = 3.1, 0.5 + 0.19 * len(systems)
    fig = plt.figure(figsize=(7, sum(heights)))
    above, below = fig.subfigures(2, height_ratios=heights)  # long names below leave the panels above their width
    (loss, minus), end = above.subplots(1, 2), below.subplots()
    enlarge_end(loss, [curve(s, "validation", unit) for s in systems.values()])
    loss.set(xlabel=f"{UNITS[unit]} of training", ylabel="nats per token", title="validation loss")
    differences = [curve(s, "validation", unit, first) for s in systems.values()]
    low, high = bands(minus, differences, start=0.4 * differences[0][-1][0])
    minus.set(xlabel=f"{UNITS[unit]} of training", title=f"minus {base}'s, seed by seed")
    if high > low:
        minus.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    for i, s in enumerate(systems.values()):
        difference, interval, _ = paired(final(s["runs"]), final(first["runs"]))
        end.plot(interval or [difference] * 2, (i, i), "|-", color=line(i)["color"])
        end.plot(difference, i, "o", color=line(i)["color"], ms=4)
        end.plot((0.004, 0.06), (i, i), transform=end.get_yaxis_transform(), **line(i))
    left, right = end.get_xlim()
    end.set(xlim=(left - 0.08 * (right - left), right), xlabel=f"minus {base}'s at the end, with its 95% interval")
    end.set_yticks(range(len(systems)), systems)
    end.set_ylim(len(systems) - 0.5, -0.5)
    text, seeds = data["config"]["dataset"], ", ".join(map(str, data["seeds"]))
    fig.suptitle(f"{text}, {budget:,.0f} {UNITS[unit]}: mean ± sd over seeds {seeds}", fontsize=10)
    save(fig, path)


def per_step(command, tokens_per_second):
    """What a step of a system's command costs, in each of UNITS."""
    cfg = parse(train.Config, command)
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    return dict(steps=1, tokens=tokens, seconds=tokens / tokens_per_second, calls=oracle_calls(model_of(cfg)))


def budgeted(command, value, unit, tokens_per_second):
    """A system's command with as many steps as the budget allows."""
    steps = value / per_step(command, tokens_per_second)[unit]
    return [*command, f"--max_iters={max(1, round(steps))}", "--lr_decay_iters=None"]


def with_rate(command, rate):
    """A system's command at another learning rate, min_lr in proportion; None: as it is."""
    if rate is None:
        return command
    cfg = parse(train.Config, command)
    return [*command, f"--learning_rate={rate}", f"--min_lr={cfg.min_lr * rate / cfg.learning_rate}"]


def beyond(of_rate):
    """The rates to try after {rate: record}: if the lowest or the highest is the best, the next one, by the same ratio."""
    best, *others = sorted(of_rate, key=lambda rate: final([of_rate[rate]]))
    if min(others) < best < max(others):
        return []
    return [float(f"{best**2 / min(others, key=lambda rate: abs(rate - best)):.4g}")]


def tune(commands, folder, known, args):
    """
    A run of each system at each rate, on a seed that serves nothing else, for tuning_share of the budget: {system: {rate: its
    record}}. Raises UserError if a system diverges at all of args.learning_rates.
    """
    tried, rates = {system: {} for system in commands}, dict.fromkeys(commands, args.learning_rates or [])
    while any(rates.values()):
        work = {}
        for system, command in commands.items():
            cfg = parse(train.Config, command)
            parts = dict(max_iters=cfg.max_iters, warmup_iters=cfg.warmup_iters, lr_decay_iters=cfg.lr_decay_iters)
            parts = {knob: n and max(1, round(args.tuning_share * n)) for knob, n in parts.items()}
            for rate in rates[system]:
                out_dir = folder(system, f"rate={rate}", "tuning")
                work[out_dir] = [*with_rate(command, rate), *(f"--{knob}={n}" for knob, n in parts.items()),
                                 f"--seed={args.tuning_seed}", f"--out_dir={out_dir}", "--overwrite=True"]  # fmt: skip
        runs = outcomes(work, known, args.jobs)
        for system in commands:
            tried[system] |= {rate: runs[folder(system, f"rate={rate}", "tuning")] for rate in rates[system]}
        if failed := [system for system, of_rate in tried.items() if min(final(of_rate.values())) == math.inf]:
            raise UserError(f"{', '.join(failed)} diverged at every learning rate: lower them")
        rates = {system: beyond(of_rate) if args.grow else [] for system, of_rate in tried.items()}
    return tried


def main(arguments):
    shared = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = parser_with(__doc__, seeds=[1, 2])
    parser.add_argument("name", help="of the comparison")
    parser.add_argument(
        "--systems", nargs="+", required=True, help='variants, or "VARIANT --override=value"; the first is the base'
    )
    parser.add_argument("--config", default="config/demo.toml")
    budget = parser.add_mutually_exclusive_group()
    for unit, name in UNITS.items():
        budget.add_argument(f"--{unit}", type=float, help=f"{name} of training, the same for every system")
    parser.add_argument("--learning_rates", nargs="+", type=float, help="rates to try: each system then runs at its best one")
    parser.add_argument("--tuning_seed", type=int, default=0, help="the seed on which the rates are compared")
    parser.add_argument("--tuning_share", type=float, default=1.0, help="share of the budget for each run that compares rates")
    parser.add_argument("--grow", action="store_true", help="try more rates while the best is the lowest or the highest")
    parser.add_argument("--untimed", action="store_true", help="leave out the steps that measure speed, and the seconds")
    parser.add_argument("--reuse", nargs="+", action="extend", default=[],
                        help=".json of earlier comparisons, whose runs need not run again")  # fmt: skip
    parser.add_argument("--out", default="results", help="folder of NAME.md, .png and .json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores")
    args = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)

    def folder(*words):
        return os.path.join("out", args.name, "-".join(words).replace(" --", "_").replace("/", "_"))

    value, unit = next(((v, u) for u in UNITS if (v := getattr(args, u)) is not None), (None, "steps"))
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"--{unit} {value:g} must be positive and finite")
    if not 0 < args.tuning_share <= 1:
        raise UserError(f"--tuning_share {args.tuning_share:g} must lie above 0 and be at most 1")
    if len({*args.seeds}) < len(args.seeds):
        raise UserError(f"--seeds {shlex.join(map(str, args.seeds))}: a seed that comes twice is no second run")
    if args.grow and len({*(args.learning_rates or [])}) < 2:
        raise UserError("--grow needs two --learning_rates or more: it continues their ratio")
    if args.learning_rates and args.tuning_seed in args.seeds:
        raise UserError(f"--tuning_seed {args.tuning_seed} is one of --seeds: the reported seeds must not choose the rates")
    commands = {system: command_of(system, [args.config, *shared]) for system in args.systems}
    cfgs = [parse(train.Config, command) for command in commands.values()]
    if len({(cfg.eval_iters * cfg.batch_size, cfg.block_size, fingerprint(meta_of(cfg))) for cfg in cfgs}) > 1:
        same = "eval_iters * batch_size, block_size and the text"
        raise UserError(f"the systems evaluate on different windows: let {same} be the same for all")
    if value is None and len({cfg.max_iters for cfg in cfgs}) > 1:
        raise UserError("the systems have different budgets: let max_iters be the same for all, or give --steps or --tokens")
    for command, rate in itertools.product(commands.values(), args.learning_rates or []):  # a wrong rate is an error at once
        parse(train.Config, with_rate(command, rate))
    known = [run for path in args.reuse for run in read_runs(path)]
    short = [
        "--max_iters=20",
        "--warmup_iters=0",
        "--eval_interval=20",
        "--eval_iters=1",
        "--log_interval=4",
        "--overwrite=True",
    ]
    timed = {folder(s, "timed"): [*command, *short, f"--out_dir={folder(s, 'timed')}"] for s, command in commands.items()}
    alone = dict.fromkeys(commands, math.nan)
    if unit == "seconds" or not args.untimed:
        run_all(timed, 1)
        alone = {s: speed(read_metrics(folder(s, "timed"))) for s in commands}
    if value is not None:
        commands = {s: budgeted(command, value, unit, alone[s]) for s, command in commands.items()}
    tried = tune(commands, folder, known, args)
    best = {system: min(of_rate, key=lambda rate: final([of_rate[rate]]), default=None) for system, of_rate in tried.items()}
    work = {}
    for system, command in commands.items():
        for seed in args.seeds:
            out_dir = folder(system, str(seed))
            work[out_dir] = [*with_rate(command, best[system]), f"--seed={seed}", f"--out_dir={out_dir}"]
    done = outcomes(work, known, args.jobs)
    systems = {}
    for system, command in commands.items():
        runs = [done[folder(system, str(seed))] for seed in args.seeds]
        tuning = {str(rate): run for rate, run in tried[system].items()}
        systems[system] = dict(rate=best[system], per_step=per_step(command, alone[system]), runs=runs, tuning=tuning)
    if lost(systems[args.systems[0]]["runs"]):
        raise UserError(f"{args.systems[0]}, with which the others are compared, diverged: lower its learning rate")

    # the results
    first = parse(train.Config, next(iter(work.values())))
    data = dict(
        command=f"python -m experiments.compare {shlex.join(arguments)}",
        seeds=args.seeds,
        tuning_seed=args.tuning_seed,
        tuning_share=args.tuning_share,
        budget=(unit, value or first.max_iters),
        config=asdict(first) | {size: getattr(model_of(first), size) for size in ("n_layer", "n_embd")},
        systems=systems,
    )
    result = os.path.join(args.out, args.name)
    write(f"{result}.json", json.dumps(data) + "\n")
    write(f"{result}.md", report(data))
    print(report(data))
    draw(data, f"{result}.png")


if __name__ == "__main__":
    cli(main)
