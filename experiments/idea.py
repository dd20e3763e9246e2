"""
The idea as a picture: one query in the plane, its keys, and the paths on which four systems take it down its free energy.

    python -m experiments.idea --out idea.png
    python -m experiments.idea --out idea.gif

model.py's own functions make the paths. The keys have one norm, so attention minus the query is exactly a gradient step on
the free energy of E_j = |q - k_j|^2 / 2: assert_gradient() checks this at every point of the paths.
"""

import math

import torch
from matplotlib.animation import FuncAnimation, PillowWriter

from experiments.arguments import parser_with
from experiments.plot import new_figure, save
from guard import cli
from model import RULES, GPTConfig, newton_attention, softmax_attention

ANGLES = (-32, 39, 99, 104)  # of the keys, in degrees: two near each other, and a valley that leads to them
RADIUS, START, LAYERS = 2.0, (-1.0, -2.0), 12
K = RADIUS * torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in ANGLES], dtype=torch.float64)
SYSTEMS = dict(MHA="attention", MomenMHA="heavy ball", NagMHA="look-ahead", MHA2nd1st="Newton")


def free_energy(q):
    """F(q) = -sqrt(2) log sum_j exp(-|q - k_j|^2 / (2 sqrt(2))) of points q, (..., 2)."""
    T = math.sqrt(2)
    return -T * torch.logsumexp(-(q[..., None, :] - K).square().sum(-1) / (2 * T), -1)


def path(variant):
    """The query before the first layer and after each, (LAYERS + 1, 2): attention alone, with the keys held fixed."""
    config = GPTConfig(variant=variant, learned="", n_layer=LAYERS, n_head=1, n_embd=2)
    rule, k = RULES[config.momentum](config, 1, 0, 1), K[None, None]

    def oracle(q):
        q = q[None]
        o = softmax_attention(q, k, k) if config.curvature == "none" else newton_attention(q, k, k, config.tau)
        return (o - q)[0]

    x, points = torch.tensor([[START]], dtype=torch.float64), []
    v = torch.zeros_like(x)
    for _ in range(LAYERS + 1):
        points.append(x)
        x, v = rule(x, v, oracle)
    return torch.cat(points)[:, 0]


def assert_gradient(q):
    """Attention minus the query is minus the gradient of the free energy, at all points q, (n, 2)."""
    q = q.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(free_energy(q).sum(), q)
    step = softmax_attention(q[:, None, None], K.expand(len(q), 1, -1, -1), K.expand(len(q), 1, -1, -1))[:, 0, 0] - q
    assert (step + gradient).abs().max() < 1e-12


def plane(ax, x, y):
    """This part of the plane, x and y from and to: the contours of the free energy, and the keys."""
    points = torch.stack(torch.meshgrid(torch.linspace(*x, 200), torch.linspace(*y, 200), indexing="xy"), -1).double()
    ax.contourf(*points.unbind(-1), free_energy(points), 30, cmap="Greys", alpha=0.5)
    ax.plot(*K.T, "k*", ms=10, label="keys")
    ax.set(aspect="equal", xticks=[], yticks=[], xlim=x, ylim=y)


def draw(paths, out):
    """The plane with the keys, the contours of F and the paths; beside it F by layer. A GIF shows them layer by layer."""
    fig, (ax, beside) = new_figure(2)
    plane(ax, (-1.9, 3.3), (-2.4, 2.6))
    lines = []
    for i, (name, points) in enumerate(paths.items()):
        style = dict(color=f"C{i}", marker="o", ms=3.5)
        lines.append((points, *ax.plot(*points.T, **style, label=f"{name}: {SYSTEMS[name]}")))
        lines.append(
            (torch.stack((torch.arange(len(points)), free_energy(points)), 1), *beside.plot(free_energy(points), **style))
        )
    ax.set(title="one query in the plane, from the lower left")
    beside.set(xlabel="layers", title="its free energy", ylim=(-1.25, 0.6))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if not out.endswith(".gif"):
        return save(fig, out)

    def after(layers):
        for points, line in lines:
            line.set_data(*points[: layers + 1].T)

    frames = [*range(LAYERS + 1), *[LAYERS] * 4]  # the last stays a while
    save(FuncAnimation(fig, after, frames), out, PillowWriter(fps=2))


def main(arguments):
    parser = parser_with(__doc__)
    parser.add_argument("--out", default="idea.png", help="the file to write: a PNG, or a GIF that moves")
    args = parser.parse_args(arguments)
    paths = {name: path(name) for name in SYSTEMS}
    assert_gradient(torch.cat([*paths.values()]))
    draw(paths, args.out)


if __name__ == "__main__":
    cli(main)
