"""
Loss curves of one or several runs as a PNG.

    python -m experiments.plot out/demo out/mha --by tokens --out loss.png
    python -m experiments.plot "with momentum=out/demo" MHA=out/mha
"""

import json
import os
from math import isfinite

import matplotlib
import numpy as np

from experiments.arguments import parser_with
from guard import UserError, cli

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.style.use(os.path.join(os.path.dirname(__file__), "style.mplstyle"))
X = dict(step="training step", tokens="training tokens", seconds="seconds of training")


def read_metrics(path):
    """The records of a run's metrics.jsonl; path is the file or the run's folder. Raises UserError."""
    path = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(path) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]  # a full disk cuts the last one short
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the out_dir of a run of train.py, or LABEL=out_dir"
        ) from None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not a metrics.jsonl of train.py") from None


def new_figure(columns=1):
    """A figure as wide as the README's, and its axes: one, or an array of `columns` side by side."""
    return plt.subplots(1, columns)


def line(i):
    """The look of the i-th of many lines: the style's colours in turn, and another dash when they are used up."""
    n = len(plt.rcParams["axes.prop_cycle"])
    return dict(color=f"C{i % n}", ls=("-", "--", ":", "-.")[i // n % 4])


def bands(ax, curves, start):
    """
    Curves [[(x, mean, sd), ...], ...] as lines in bands of mean ± sd. Returns the lowest and the highest point that the bands
    have from x = start on.
    """
    late = []
    for i, points in enumerate(curves):
        x, mean, sd = np.array(points).T
        ax.plot(x, mean, **line(i))
        ax.fill_between(x, mean - sd, mean + sd, color=line(i)["color"], alpha=0.15, lw=0)
        late += [y for y in (*(mean - sd)[x >= start], *(mean + sd)[x >= start]) if isfinite(y)]
    return min(late), max(late)


def enlarge_end(ax, curves, share=0.3):
    """The bands of curves, and in an inset the last `share` of x."""
    inset, last = ax.inset_axes((0.34, 0.36, 0.64, 0.62)), max(points[-1][0] for points in curves)
    start = (1 - share) * last
    bands(ax, curves, start)
    inset.set(ylim=bands(inset, curves, start), xlim=(start, last))
    inset.tick_params(labelsize=7)
    ax.indicate_inset_zoom(inset, edgecolor="black", alpha=0.4)


def save(figure, path, *how):
    """Write a figure, or an animation by the writer `how`, and print the path. Raises UserError."""
    try:
        (figure.save if how else figure.savefig)(path, *how)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    plt.close("all")
    print(path)


def labelled(run):
    """The label and the path of LABEL=PATH, or of a path alone, whose last folder is its label."""
    label, equals, path = run.partition("=")
    if not equals or os.path.exists(run):  # experiments.compare makes folders with a = in their names
        label, path = os.path.basename(os.path.normpath(run.removesuffix("metrics.jsonl"))), run
    return label, path


def main(arguments):
    parser = parser_with(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, or their metrics.jsonl; LABEL=PATH names one")
    parser.add_argument("--by", choices=X, default="step")
    parser.add_argument("--out", default="loss.png", help="the PNG to write")
    args = parser.parse_args(arguments)

    fig, ax = new_figure()
    for i, (label, path) in enumerate(map(labelled, args.runs)):
        records = read_metrics(path)
        for key, style in (("train_loss", dict(alpha=0.35, lw=1)), ("val_loss", dict(marker="o", ms=3, label=label))):
            points = [(r[args.by], r[key]) for r in records if key in r]
            ax.plot(*zip(*points, strict=True), **line(i), **style)
    ax.set_xlabel(X[args.by])
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("validation loss (dots) and training loss (faint)")
    ax.legend()
    save(fig, args.out)


if __name__ == "__main__":
    cli(main)
