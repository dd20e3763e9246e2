"""
Loss curves of one or several runs as a PNG.

    python -m experiments.plot out/demo out/mha --by tokens --out loss.png
"""

import argparse
import json
import os

import matplotlib

from configurator import UserError, cli

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.style.use("tableau-colorblind10")
X = dict(step="training step", tokens="training tokens", seconds="seconds of training")


def read_metrics(path):
    """The records of a run's metrics.jsonl; path is the file or the run's folder. Raises UserError."""
    path = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the out_dir of a run of train.py") from None
    except json.JSONDecodeError:
        raise UserError(f"{path} is not a metrics.jsonl of train.py") from None


def new_figure():
    """A figure and its axes, of README width."""
    fig, ax = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    ax.grid(alpha=0.3)
    return fig, ax


def save(fig, path):
    """Write the figure and say where. Raises UserError."""
    try:
        fig.savefig(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    plt.close(fig)
    print(path)


def label(path):
    return os.path.basename(os.path.normpath(path.removesuffix("metrics.jsonl")))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or their metrics.jsonl")
    parser.add_argument("--by", choices=X, default="step")
    parser.add_argument("--out", default="loss.png", help="the PNG to write")
    args = parser.parse_args(arguments)

    fig, ax = new_figure()
    for i, run in enumerate(args.runs):
        records = read_metrics(run)
        for key, style in (("train_loss", dict(alpha=0.35, lw=1)), ("val_loss", dict(marker="o", ms=3, label=label(run)))):
            points = [(r[args.by], r[key]) for r in records if key in r]
            ax.plot(*zip(*points, strict=True), color=f"C{i}", **style)
    ax.set_xlabel(X[args.by])
    ax.set_ylabel("loss (nats per token)")
    ax.set_title("validation loss (dots) and training loss (faint)", fontsize=10)
    ax.legend(frameon=False)
    save(fig, args.out)


if __name__ == "__main__":
    cli(main)
