"""
What a trained model's attention descends, as one PNG: its free energy before and after attention's step, the entropy
of its weights, the scalars that the layers learned, and the weights themselves. The energies also as a table.

    python -m experiments.energy out/demo --out energy.png

Energies and entropies are means over positions and sequences. Layers count from 0, in the order of their application.
"""

import math
import os
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

import checkpoint
from experiments.arguments import parser_with
from experiments.plot import plt, save
from experiments.records import text_of, windows
from guard import UserError, cli
from model import Scalar, causal

HEADS, POSITIONS = 4, 64  # of the attention weights, as many as stay readable


def read(folder, split, sequences, state):
    """Evenly spaced windows of the split, (sequences, block_size), for the model of a checkpoint. Raises UserError."""
    if sequences < 1:
        raise UserError(f"--sequences {sequences} must be at least 1")
    return windows(folder, split, sequences, state)[0]


def log_sum_exp(E, temperature):
    """
    F = -temperature log sum_j exp(-E_j / temperature), (B, nh, T), and the p_j of its gradient. E: (B, nh, T, T); temperature:
    a number or (nh, 1, 1).
    """
    logits = (-E / temperature).masked_fill(~causal(E), -math.inf)
    return -(temperature * logits.logsumexp(-1, keepdim=True)).squeeze(-1), logits.softmax(-1)


def free_energy(attn, x, context):
    """
    The free energy of an attention's queries at x among its keys at context, (B, nh, T), and the p_j of its gradient,
    (B, nh, T, T), before a curvature or Huber's cut reweighs them. The linear energies are plain sums: their p_j are None.
    Raises UserError for an energy that has no case here.
    """
    config = attn.config
    if config.tied:  # summed over heads it is the energy of the token
        return log_sum_exp(-attn.project(x, 0) @ attn.project(context, 1).mT, attn.sqrt_hs)
    q, k = attn.qkv(x)[0], attn.qkv(context)[1]
    match config.energy:
        case "softmax":
            T = attn.temperature()  # in units of sqrt(hs); qkv() gave q.k / T
            return log_sum_exp(-q @ k.mT * T, attn.sqrt_hs * T)
        case "huber":
            r = torch.cdist(q, k)
            E = F.huber_loss(r, torch.zeros_like(r), reduction="none", delta=config.delta * attn.sqrt_hs)
            return log_sum_exp(E, attn.sqrt_hs)
        case "linear" | "gated_linear":
            b = attn.log_a(context).cumsum(-1)
            decay = (b[..., :, None] - b[..., None, :]).exp().tril()
            return (-(q @ k.mT).square() / 2 * decay).sum(-1), None
    raise UserError(
        f"experiments.energy does not know the free energy of energy={config.energy}: add its case to free_energy()"
    )


@torch.no_grad()
def energies(model, idx):
    """
    What attention descends, layer by layer, for idx (B, T): dict of
        before, after   free energy of the queries before and after attention's step, among the keys that attention saw:
                        (layers, nh), means over sequences and positions, in units of q.k, or (q.k)^2 for linear energies.
                        Euler splitting: the step is the MLP's too. Strang splitting: the first half step
        entropy         of attention's p_j, in nats: (layers, nh); None for the linear energies
        attention       these p_j for the first sequence: (layers, nh, T, T); None likewise
    """
    x, v = model.embed(idx)
    rows = defaultdict(list)
    for block in model.layers():
        (rule, (attention, *mlp)), *others = block.steps()
        seen = []  # where the rule asks attention for a direction: at x, or ahead of it
        moved, v = rule(x, v, lambda y, A=attention, seen=seen: seen.append(y) or A(y), *mlp)
        context = block.ln_1(seen[0])
        for key, at in (("before", x), ("after", moved)):
            rows[key].append(free_energy(block.attn, block.ln_1(at), context)[0].mean((0, 2)))
        _, p = free_energy(block.attn, context, context)
        if p is not None:
            rows["entropy"].append(-torch.xlogy(p, p).sum(-1).mean((0, 2)))
            rows["attention"].append(p[0])
        x = moved
        for rule, oracles in others:
            x, v = rule(x, v, *oracles)
    return {key: torch.stack(rows[key]) if rows[key] else None for key in ("before", "after", "entropy", "attention")}


def scalars(model):
    """All that layers learned in a Scalar, as {name: {layer: values}}, each flat."""
    found = defaultdict(dict)
    for layer, block in enumerate(model.layers()):
        for name, module in block.named_modules():
            if isinstance(module, Scalar) and module.raw is not None:
                found[name][layer] = module().detach().flatten()
    return found


def table(energies):
    """A line for each layer, with means over heads."""
    before, after = energies["before"].mean(1), energies["after"].mean(1)
    entropy = [None] * len(before) if energies["entropy"] is None else energies["entropy"].mean(1)
    rows = [f"{'layer':>5} {'before':>12} {'after':>12} {'change':>12} {'entropy':>8}"]
    for layer, (b, a, H) in enumerate(zip(before, after, entropy, strict=True)):
        rows.append(f"{layer:5} {b:12.4f} {a:12.4f} {a - b:+12.4f} " + ("-".rjust(8) if H is None else f"{H:8.4f}"))
    return "\n".join(rows)


def draw(energies, found, config, title):
    """The figure, with panels for what there is: linear energies have no attention weights, and some systems no scalars."""
    entropy, attention, narrow = energies["entropy"], energies["attention"], energies["attention"] is None
    rows = 1 + (not narrow) + bool(found)
    fig = plt.figure(figsize=(4.5 if narrow else 10, 1.6 + 1.6 * rows))
    fig.suptitle(title, fontsize=11, weight="bold")
    left, right = (fig, None) if narrow else fig.subfigures(1, 2, width_ratios=(2, 3))
    panels = iter(left.subplots(rows, sharex=True, squeeze=False)[:, 0])

    ax = next(panels)
    ax.set_title("free energy of the queries", fontsize=10)
    ax.set_ylabel("(units of q·k)²" if narrow else "units of q·k")
    draw_heads(ax, energies["before"], color="C0", lw=3, label="before attention's step")
    draw_heads(ax, energies["after"], color="C1", lw=1.2, label="after it")
    ax.margins(y=0.2)
    ax.legend(frameon=False, fontsize=7, ncols=2)

    if not narrow:
        ax = next(panels)
        ax.set_title("entropy of attention (dashed: uniform)", fontsize=10)
        ax.set_ylabel("nats")
        draw_heads(ax, entropy, color="C0", lw=2)
        T = attention.size(2)
        uniform = math.lgamma(T + 1) / T  # the mean of log 1, ..., log T: each position sees one key more
        ax.axhline(uniform, color="C3", ls="--", lw=1)
        ax.set_ylim(0, 1.15 * uniform)
        draw_attention(right, attention)
    if found:
        ax = next(panels)
        ax.set_title("learned scalars", fontsize=10)
        draw_scalars(ax, found, config.n_embd)
        ax.legend(frameon=False, fontsize=7, ncols=3, columnspacing=1, loc="upper center", bbox_to_anchor=(0.5, -0.4))
    ax.set_xlabel("layer" if config.n_loop == 1 else f"layer ({config.n_loop} rounds of {config.n_layer})")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlim(-0.3, len(energies["before"]) - 0.7)
    return fig


def draw_heads(ax, values, color, **style):
    """values, (layers, nh), by layer: a thin line for each head, and their mean."""
    ax.plot(values, lw=0.6, alpha=0.4, color=color)
    ax.plot(values.mean(1), marker="o", ms=2 + style["lw"], color=color, **style)


def draw_scalars(ax, found, width):
    """Means by layer, shaded from least to greatest; not for a scalar of every channel, whose outliers would fill the panel."""
    for i, (name, values) in enumerate(found.items()):
        layers, values = zip(*values.items(), strict=True)
        ax.plot(layers, [v.mean() for v in values], lw=1.5, marker="osD^v"[i % 5], ms=4, color=f"C{i}", label=name)
        if all(len(v) < width for v in values):
            ax.fill_between(layers, [v.min() for v in values], [v.max() for v in values], color=f"C{i}", alpha=0.15, lw=0)


def draw_attention(fig, attention):
    """attention, (layers, nh, T, T): heat maps of the first, the middle and the last layer, by head."""
    layers = sorted({0, len(attention) // 2, len(attention) - 1})
    p = attention[layers, :HEADS, :POSITIONS, :POSITIONS].numpy()
    future = np.triu(np.ones(p.shape[2:], dtype=bool), 1)
    # nearly all weights are small: a scale of square roots, cut at the 99th percentile, shows them
    norm = PowerNorm(0.5, 0, np.quantile(p[..., ~future], 0.99))
    axes = fig.subplots(*p.shape[:2], squeeze=False, sharex=True, sharey=True)
    for i, j in np.ndindex(axes.shape):
        image = axes[i, j].imshow(np.ma.array(p[i, j], mask=future), norm=norm, cmap="cividis", interpolation="nearest")
        axes[i, j].set_title(f"layer {layers[i]}, head {j}", fontsize=8)
    fig.suptitle("attention weights in the first sequence", fontsize=10)
    fig.supxlabel("position of the key", fontsize=9)
    fig.supylabel("position of the query", fontsize=9)
    fig.colorbar(image, ax=axes, shrink=0.6, aspect=30, extend="max", label="weight")


def main(arguments):
    parser = parser_with(__doc__, ckpt="best.pt", split="val", data_dir=None)
    parser.add_argument("out_dir", help="folder of the checkpoint")
    parser.add_argument("--sequences", type=int, default=8, help="windows of text to average over")
    parser.add_argument("--out", default="energy.png", help="the PNG to write")
    args = parser.parse_args(arguments)

    model, state = checkpoint.load_model(os.path.join(args.out_dir, args.ckpt))
    found = energies(model, read(text_of(state, args.data_dir), args.split, args.sequences, state))
    print(table(found))
    fig = draw(found, scalars(model), model.config, f"{model.config.variant} after {state['step']:,} steps")
    save(fig, args.out)


if __name__ == "__main__":
    cli(main)
