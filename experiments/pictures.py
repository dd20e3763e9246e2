"""
The pictures of LEARN.md: where look-ahead leads, three splittings, what tau does to the weights, and steps that are undone.
model.py's own functions and rules make the steps.

    python -m experiments.pictures --out results

Three of them show a point in the plane of experiments.idea, with its keys and the contours of its free energy.
"""

import math
import os

import torch

from experiments.arguments import parser_with
from experiments.idea import K, plane
from experiments.plot import new_figure, save
from guard import cli
from model import RULES, SPLITTINGS, GPTConfig, light_attention, newton_attention, softmax_attention


def attention(q):
    """Minus the gradient of the free energy at a point (2,) of the plane: attention minus the query."""
    return softmax_attention(q[None, None, None], K[None, None], K[None, None])[0, 0, 0] - q


def swirl(q):
    """A second oracle, in the place of the MLP: it turns the plane about the origin."""
    return 0.9 * torch.stack((-q[1], q[0]))


def rule(momentum, weight=1.0, **choices):
    """An update rule by its name, for points (2,); its numbers are constants."""
    return RULES[momentum](GPTConfig(momentum=momentum, n_layer=1, n_head=1, n_embd=2, **choices), 1, 0, weight)


def arrow(ax, start, end, **style):
    """An arrow from point to point."""
    ax.annotate("", end.tolist(), start.tolist(), arrowprops=dict(arrowstyle="->", lw=1.8, shrinkA=0, shrinkB=0) | style)


def look_ahead():
    """(x, v, {rule: where its step ends}): one step of the heavy ball and of Nesterov, from one point with one velocity."""
    x, v = torch.tensor([0.2, -1.2]).double(), torch.tensor([1.3, 1.5]).double()
    return x, v, {momentum: rule(momentum, beta=0.9)(x, v, attention)[0] for momentum in ("polyak", "nesterov")}


def draw_look_ahead(ax):
    x, v, ends = look_ahead()
    plane(ax, (-1.3, 3.6), (-1.6, 2.2))
    kept = x + 0.9 * v  # where the kept velocity alone leads, and where Nesterov asks
    arrow(ax, x, kept, color="black", ls="--")
    ax.plot([], [], "k--", label=r"the velocity that is kept, $\beta v$")
    for i, (name, label) in enumerate(
        dict(polyak="heavy ball: the gradient at $x$", nesterov=r"Nesterov: at $x + \beta v$").items()
    ):
        arrow(ax, kept, ends[name], color=f"C{i}")
        ax.plot(*ends[name], "o", color=f"C{i}", label=label)
    for text, at in {"$x$": x, r"$x + \beta v$": kept}.items():
        ax.annotate(text, at.tolist(), xytext=(8, -12), textcoords="offset points")
    ax.set_title("one step from $x$ with velocity $v$")


def split(splitting, start):
    """The points before and after each gradient step of one layer on attention and swirl, and what each asks: A, M or AM."""
    asked, oracles, points = SPLITTINGS[splitting], dict(A=attention, M=swirl), [start]
    for names in asked:
        step = rule("none", 1 / asked.count(names))
        points.append(step(points[-1], None, *[oracles[name] for name in names])[0])
    return points, asked


def flow(start, steps=1000):
    """The path along the sum of both oracles for a time of 1, in many short steps: (steps + 1, 2)."""
    points = [start]
    for _ in range(steps):
        points.append(points[-1] + (attention(points[-1]) + swirl(points[-1])) / steps)
    return torch.stack(points)


def draw_split(ax):
    start = torch.tensor([1.0, -1.9]).double()
    plane(ax, (-0.3, 3.9), (-2.2, 1.6))
    ax.plot(*flow(start).T, "k:", label="both at all times")
    for i, splitting in enumerate(SPLITTINGS):
        points, asked = split(splitting, start)
        for a, b, names in zip(points[:-1], points[1:], asked, strict=True):
            arrow(ax, a, b, color=f"C{i}", ls=dict(A="-", M="--", AM="-.")[names])
        ax.plot(*points[-1], "o", color=f"C{i}", label=f"{splitting}: {', '.join(asked)}")
    ax.set_title("one layer of two oracles: attention (A, solid) and a rotation (M, dashed)")


def weights(attend, tau, n=8, hs=8):
    """The weights that a random query gives n random keys of one norm, (n,), sorted by softmax attention's weight."""
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 1, m, hs, dtype=torch.float64, generator=g) for m in (1, n))
    k = k / k.norm(dim=-1, keepdim=True) * math.sqrt(hs)
    k = k[:, :, (q @ k.mT).flatten().argsort(descending=True)]
    padded = torch.eye(n, hs, dtype=torch.float64)[None, None]  # one-hot values: the output is then the weights
    return attend(2 * q, k, padded, tau)[0, 0, 0, :n]


def draw_tau(axes):
    for ax, (title, attend) in zip(
        axes, {"MHA2nd1st": newton_attention, "LightMHA2nd1st": light_attention}.items(), strict=True
    ):
        for i, tau in enumerate((0.0, 0.5, 1.0)):
            w = weights(attend, torch.tensor(tau).double())
            ax.bar([j + 0.27 * (i - 1) for j in range(len(w))], w.tolist(), 0.27, color=f"C{i}", label=rf"$\tau = {tau:g}$")
        ax.set(title=title, xlabel="keys, by attention's weight", xticks=[], ylim=(-0.03, 0.43))
        ax.axhline(0, color="black", lw=0.8)
    axes[0].set_ylabel("weight of the value")


def there_and_back(beta, dtype, layers=48):
    """The iterates of heavy-ball steps, and the same as rebuilt from the last one: two of (layers + 1, 2)."""
    step = rule("polyak", beta=beta)
    x, v = torch.tensor([-1.0, -2.0], dtype=dtype), torch.zeros(2, dtype=dtype)
    there = [x]
    for _ in range(layers):
        x, v = step(x, v, lambda q: attention(q.double()).to(dtype))
        there.append(x)
    back = [x]
    for _ in range(layers):
        x = x - v
        v = (v - attention(x.double()).to(dtype)) / beta
        back.append(x)
    return torch.stack(there), torch.stack(back[::-1])


def draw_back(axes):
    plane(axes[0], (-1.6, 3.1), (-2.5, 2.4))
    there, back = there_and_back(0.5, torch.float64)
    axes[0].plot(*there.T, "o-", color="C0", ms=7, label="48 layers")
    axes[0].plot(*back.T, "o", color="C1", ms=3, label="rebuilt from the last")
    axes[0].set_title("beta = 0.5, float64")
    for i, (beta, dtype) in enumerate(((0.9, torch.float64), (0.5, torch.float64), (0.9, torch.float32), (0.5, torch.float32))):
        there, back = there_and_back(beta, dtype)
        error = (there - back).norm(dim=-1).flip(0)[1:].cummax(0).values
        axes[1].semilogy(
            range(1, len(error) + 1), error, color=f"C{i}", label=f"{dtype}".removeprefix("torch.") + f", beta = {beta}"
        )
    axes[1].set(title="largest error of the rebuilt points so far", xlabel="layers undone")


PICTURES = dict(look_ahead=(1, draw_look_ahead), split=(1, draw_split), tau=(2, draw_tau), back=(2, draw_back))


def main(arguments):
    parser = parser_with(__doc__)
    parser.add_argument("--out", default="results", help="the folder of learn_look_ahead.png and the others")
    args = parser.parse_args(arguments)
    for name, (columns, draw) in PICTURES.items():
        fig, axes = new_figure(columns)
        draw(axes)
        handles = {label: h for ax in fig.axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        fig.legend(handles.values(), handles, loc="outside lower center", ncols=3)
        save(fig, os.path.join(args.out, f"learn_{name}.png"))


if __name__ == "__main__":
    cli(main)
