"""
Three toy problems in minutes on a CPU, and how large the gradients are that each layer's attention gets.

    python prepare.py lis
    python -m experiments.toy --systems MHA MomenMHA NagMHA DenseMHA --seeds 1 2 3 --steps 600 --out results/toy
    python -m experiments.toy --problems gaussian_process --n_embd 64 --steps 2000 \\
        --systems "Llama --optimizer=muon" "CEM --optimizer=muon" --out results/gaussian_process

regression: x_1, y_1, ..., x_n, y_n with y = w.x + noise and a fresh w in each sequence; every y is predicted from the
examples before it, in mean squared error. gaussian_process: the same with y = f(x) + noise, x of 10 dimensions and f a fresh
draw of a Gaussian process, in root mean squared error ([Xu]'s synthetic task; kernel, noise and sizes are ours). lis: the
lengths of longest increasing subsequences (prepare.py lis), trained on all tokens, judged by the lengths.

MomenMHA unrolls to a weighted DenseNet over the attentions' outputs ([Ren], arXiv 2511.00907); do these implicit
skips pass larger gradients to early layers? The norms of the loss gradient in each layer's attention parameters tell, as means
over all steps. Curves and norms go to --out.png, tables to --out.md, numbers to --out.json; a problem, system and seed
that stands there isn't run again.
"""

import math
import os
import shlex
import statistics
import time
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from configurator import parse
from data import Split, fingerprint, read_meta
from device import pick_device
from experiments.arguments import parser_with
from experiments.plot import plt, save
from experiments.records import Records, made, markdown, mean_sd, write
from guard import UserError, cli
from model import GPT
from train import Config, learning_rate, model_config, optimizers, set_rate

SEQUENCES, NOISE = 32, 0.1  # of the regressions: sequences in a batch, standard deviation of the noise
BLOCK_SIZE, WINDOWS = 128, 4  # of lis: tokens in a window, windows in a batch
END, EQUALS, ZERO, NINE = 256, *b"=09"


class Regression:
    """In-context linear regression. Tokens are vectors: (x, 0) and (0, y); linear maps replace the token tables."""

    title, loss, name, text = "in-context regression", "mean squared error", "regression", {}
    known = "the posterior mean"
    D, EXAMPLES = 2, 8  # dimension of x, pairs (x, y) in a sequence

    def __init__(self, data_dir, device):
        self.device, self.sizes = device, dict(block_size=2 * self.EXAMPLES, vocab_size=1)
        self.held_out = self.examples(16 * SEQUENCES, seed=-1)
        self.least = self.posterior(*self.held_out)
        self.reference = self.summary(self.least)["loss"]

    def kernel(self, x):
        """The covariance of f at the points of each sequence, (n, EXAMPLES, EXAMPLES): here of w.x, w of variance 1 / D."""
        return x @ x.mT / self.D

    def values(self, x, generator):
        """f(x), (n, EXAMPLES, 1), a fresh f in each sequence."""
        w = torch.randn(len(x), 1, self.D, generator=generator)
        return (x * w).sum(2, keepdim=True) / math.sqrt(self.D)

    def examples(self, n, seed):
        """x: (n, EXAMPLES, D), standard normal, and y: (n, EXAMPLES, 1), of variance 1 plus the noise's."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, self.EXAMPLES, self.D, generator=generator)
        y = self.values(x, generator) + NOISE * torch.randn(n, self.EXAMPLES, 1, generator=generator)
        return x.to(self.device), y.to(self.device)

    def posterior(self, x, y):
        """
        Mean squared errors, (EXAMPLES,), of the best predictor: the posterior mean of f(x_i) given the examples before.
        If L L^T is the covariance of y, the i-th error is L_ii (L^-1 y)_i (derived). In float64: in float32 L may not exist.
        """
        x, y = x.cpu().double(), y.cpu().double()
        L = torch.linalg.cholesky(self.kernel(x) + NOISE**2 * torch.eye(x.size(1)).double())
        return (L.diagonal(dim1=1, dim2=2) * torch.linalg.solve_triangular(L, y, upper=False)[..., 0]).square().mean(0)

    def fit(self, model):
        """A GPT with read-in and read-out in place of its tables and head."""
        C = model.config.n_embd
        for table in {"wte", "vte"} & {*model.transformer}:
            model.transformer[table] = nn.Linear(self.D + 1, C)
        model.lm_head = nn.Linear(C, 1)

    def batch(self, seed, step):
        return self.examples(SEQUENCES, seed=seed * 1_000_003 + step)

    def training_loss(self, model, x, y):
        return self.errors(model, x, y).mean()

    def errors(self, model, x, y):
        """Squared errors, (B, EXAMPLES), the i-th with i examples in the context."""
        tokens = torch.stack((F.pad(x, (0, 1)), F.pad(y, (self.D, 0))), 2).flatten(1, 2)
        return (model.lm_head(model.hidden(tokens))[:, ::2] - y).square().squeeze(2)

    def evaluate(self, model):
        return self.summary(self.errors(model, *self.held_out).mean(0))

    def summary(self, squared):
        """The numbers to report, from mean squared errors (EXAMPLES,)."""
        return dict(loss=squared.mean().item(), by_examples=squared.tolist())

    def draw(self, ax, runs, colors):
        for system, seeds in runs.items():
            band(ax, range(self.EXAMPLES), [r["evaluations"][-1]["by_examples"] for r in seeds], colors[system])
        ax.plot(self.summary(self.least)["by_examples"], color="black", ls="--", lw=1)
        ax.set(xlabel="examples in the context", ylabel=f"final {self.loss}", yscale="log")

    def columns(self):
        """The table's columns beside the loss: {head: a function that takes the number out of an evaluation}."""
        at = (0, 1, self.D, self.EXAMPLES - 1)
        return {f"{i} examples": lambda e, i=i: e["by_examples"][i] for i in at}

    def describe(self):
        least, of_0 = self.summary(self.least)["by_examples"], self.summary(torch.tensor([1 + NOISE**2]))["loss"]
        return (
            f"{self.name}: x of dimension {self.D}, {self.EXAMPLES} examples in a sequence, {SEQUENCES} sequences per step, "
            f"noise of standard deviation {NOISE}. Predicting 0 has a {self.loss} of {of_0:.3f}. The posterior "
            f"mean, the best there is, has a {self.loss} of {self.reference:.3f}, and of {least[-1]:.3f} with "
            f"{self.EXAMPLES - 1} examples."
        )


class GaussianProcess(Regression):
    """In-context regression on draws of a Gaussian process with the kernel exp(-|x - x'|^2 / (2 D))."""

    title, loss, name = "Gaussian processes", "root mean squared error", "gaussian_process"
    D, EXAMPLES = 10, 32

    def kernel(self, x):
        return torch.exp(-torch.cdist(x, x).square() / (2 * self.D))

    def values(self, x, generator):
        K = self.kernel(x.double()) + 1e-9 * torch.eye(x.size(1)).double()  # two points may almost be one
        z = torch.randn(len(x), x.size(1), 1, generator=generator)
        return (torch.linalg.cholesky(K) @ z.double()).float()

    def summary(self, squared):
        return dict(loss=squared.mean().sqrt().item(), by_examples=squared.sqrt().tolist())


class LIS:
    """Prefix longest increasing subsequences, as bytes."""

    title, loss, name = "longest increasing subsequence", "loss (nats per digit of a length)", "lis"
    known = "the length before"
    sizes = dict(block_size=BLOCK_SIZE, vocab_size=END + 1)

    def __init__(self, data_dir, device):
        self.device, self.folder = device, os.path.join(data_dir, "lis")
        validation = Split(self.folder, "val", BLOCK_SIZE)
        self.held_out = self.tensors(validation.windows(validation.fixed(16 * WINDOWS)))
        self.training, self.reference, self.text = {}, None, dict(data=fingerprint(read_meta(self.folder)))

    def tensors(self, arrays):
        return [torch.from_numpy(t).to(self.device) for t in arrays]

    def fit(self, model):
        """Nothing to change: a GPT reads tokens."""

    def batch(self, seed, step):
        split = self.training.setdefault(seed, Split(self.folder, "train", BLOCK_SIZE, seed))
        return self.tensors(split.batch(range(step * WINDOWS, (step + 1) * WINDOWS)))

    def training_loss(self, model, x, y):
        return model(x, y)[1]

    def evaluate(self, model):
        """Loss and accuracy of the digits of the lengths."""
        x, y = self.held_out
        asked = lengths(x, y)
        logits, digits = model.lm_head(model.hidden(x))[asked], y[asked]
        return dict(loss=F.cross_entropy(logits, digits).item(), accuracy=(logits.argmax(1) == digits).float().mean().item())

    def draw(self, ax, runs, colors):
        for system, seeds in runs.items():
            band(ax, seeds[0]["steps"], [[e["accuracy"] for e in r["evaluations"]] for r in seeds], colors[system])
        ax.axhline(self.repeating(), color="black", ls="--", lw=1)
        ax.set(xlabel="training step", ylabel="accuracy of the lengths")

    def repeating(self):
        """Accuracy of repeating the length before, 1 at the start."""
        x, y = self.held_out
        before = torch.where(x == EQUALS, ZERO + 1, x).roll(1, 1)
        return (before == y)[lengths(x, y)].float().mean().item()

    def columns(self):
        return dict(accuracy=lambda e: e["accuracy"])

    def describe(self):
        return (
            f"lis: {WINDOWS} windows of {BLOCK_SIZE} bytes per step; loss and accuracy of the digits of the lengths. Repeating "
            f"the length before has an accuracy of {self.repeating():.3f}."
        )


PROBLEMS = {problem.name: problem for problem in (Regression, GaussianProcess, LIS)}


def lengths(x, y):
    """Which targets y, (B, T) bool, are digits of lengths: after the = of a line that began within the window x."""
    at = torch.arange(x.size(1), device=x.device)
    end, equals = (torch.where(x == token, at, -1).cummax(1).values for token in (END, EQUALS))
    return (end >= 0) & (equals > end) & (y >= ZERO) & (y <= NINE)


def gradient_norms(model):
    """Norms of the gradient in each block's attention parameters, (n_layer,)."""
    return torch.stack([nn.utils.get_total_norm([p.grad for p in b.attn.parameters()]) for b in model.transformer.h])


def configure(system, args, seed):
    """The run's train.Config. Raises UserError."""
    flags = dict(variant=system.split()[0], seed=seed, n_layer=4, n_head=4, n_embd=args.n_embd, max_iters=args.steps,
                 learning_rate=args.learning_rate, min_lr=args.learning_rate / 10, warmup_iters=args.steps // 10)  # fmt: skip
    return parse(Config, [*(f"--{k}={v}" for k, v in flags.items()), *shlex.split(system)[1:]])


def build(problem, cfg, mlp, device):
    """The problem's model; without MLPs the direction 0 takes their place."""
    torch.manual_seed(cfg.seed)
    model = GPT(model_config(cfg, **problem.sizes))
    problem.fit(model)
    if not mlp:
        for block in model.transformer.h:
            del block.mlp, block.ln_2
            block.mlp, block.ln_2 = torch.zeros_like, nn.Identity()
    return model.to(device)


def train(problem, cfg, args, device):
    """One run: dict of steps, the evaluations there, the mean gradient norm of each layer and seconds."""
    model, began = build(problem, cfg, not args.no_mlp, device), time.time()
    opts, norms, steps, evaluations = optimizers(model, cfg, device), 0.0, [], []
    for step in range(args.steps + 1):
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            model.eval()
            with torch.no_grad():
                evaluations.append(problem.evaluate(model))
            steps.append(step)
            model.train()
        if step == args.steps:
            break
        problem.training_loss(model, *problem.batch(cfg.seed, step)).backward()
        norms += gradient_norms(model) / args.steps
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        set_rate(opts, learning_rate(step, cfg))
        for opt in opts:
            opt.step()
            opt.zero_grad()
    seconds = time.time() - began
    return dict(steps=steps, evaluations=evaluations, gradient_norms=norms.tolist(), seconds=seconds)


def band(ax, x, curves, color, **style):
    """The mean of the curves and the range that they span."""
    low, mean, high = zip(*((min(v), statistics.mean(v), max(v)) for v in zip(*curves, strict=True)), strict=True)
    ax.plot(x, mean, color=color, marker="osD^v"[int(color[1:]) % 5], ms=4, lw=1.2, **style)
    ax.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def draw(problems, results, title):
    """A row for each problem: loss by step, its own panel, gradient norm by layer. results: {problem: {system: [run]}}."""
    systems = list(next(iter(results.values())))
    columns = min(6, max(1, 130 // (8 + max(map(len, systems)))))  # of the legend: as many as the width has room for
    height = 3 * len(problems) + 0.3 + 0.2 * math.ceil(len(systems) / columns)
    fig, axes = plt.subplots(len(problems), 3, figsize=(10, height), squeeze=False)
    fig.suptitle(title, fontsize=10)
    for problem, (a, b, c) in zip(problems, axes, strict=True):
        runs = results[problem.name]
        colors = {system: f"C{i}" for i, system in enumerate(runs)}
        for system, seeds in runs.items():
            losses = [[e["loss"] for e in r["evaluations"][1:]] for r in seeds]  # the untrained loss would set the scale
            band(a, seeds[0]["steps"][1:], losses, colors[system], label=system)
            norms = [r["gradient_norms"] for r in seeds]
            band(c, range(len(norms[0])), norms, colors[system])
        if problem.reference is not None:
            a.axhline(problem.reference, color="black", ls="--", lw=1)
        a.set(xlabel="training step", ylabel=problem.loss)
        a.set_title(f"{problem.title} (dashed: {problem.known})", fontsize=9, loc="left")
        problem.draw(b, runs, colors)
        c.set(xlabel="layer", ylabel="gradient norm of attention", xticks=range(len(norms[0])), ylim=0)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return fig


def table(problem, runs):
    """A line for each system: means ± standard deviations over seeds at the end of training."""
    layers = len(next(iter(runs.values()))[0]["gradient_norms"])
    names = [*problem.columns(), *(f"gradient norm, layer {i}" for i in range(layers)), "layer 0 over the last"]
    rows = []
    for system, seeds in runs.items():
        flat = []
        for r in seeds:
            last, norms = r["evaluations"][-1], r["gradient_norms"]
            flat.append([last["loss"], *(f(last) for f in problem.columns().values()), *norms, norms[0] / norms[-1]])
        rows.append([system, *(mean_sd(values, ".3g", ".2g") for values in zip(*flat, strict=True))])
    return markdown([problem.name, problem.loss, *names], rows)


def main(arguments):
    parser = parser_with(__doc__, seeds=[1, 2, 3], data_dir="data", device="auto")
    parser.add_argument("--systems", nargs="+", default=["MHA", "MomenMHA", "NagMHA", "DenseMHA"],
                        help='variants, or "VARIANT --override=value"')  # fmt: skip
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=["regression", "lis"],
                        help="what to learn")  # fmt: skip
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--n_embd", type=int, default=32, help="width; there are 4 layers of 4 heads")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="highest rate")
    parser.add_argument("--no_mlp", action="store_true", help="attention alone: take the MLPs out")
    parser.add_argument("--out", default="results/toy", help="the .png, .md and .json to write, without the ending")
    args = parser.parse_args(arguments)
    if args.steps < 10:
        raise UserError(f"--steps {args.steps} must be at least 10")
    device = pick_device(args.device)
    configs = {(system, seed): configure(system, args, seed) for system in args.systems for seed in args.seeds}
    problems = [PROBLEMS[name](args.data_dir, device) for name in args.problems]

    results = {problem.name: {system: [] for system in args.systems} for problem in problems}
    work = [(problem, *key) for key in configs for problem in problems]
    with Records(f"{args.out}.json") as known:
        for problem, system, seed in tqdm(work, unit="run", disable=None):
            cfg = configs[system, seed]
            identity = dict(problem=problem.name, system=system, seed=seed, mlp=not args.no_mlp, config=asdict(cfg))
            record = known.find_or(
                identity | problem.text,
                lambda problem=problem, cfg=cfg: checkpoint.made_with(device) | train(problem, cfg, args, device),
            )
            results[problem.name][system].append(record)

    seeds = ", ".join(map(str, args.seeds))
    title = f"mean and range of seeds {seeds}; 4 layers, width {args.n_embd}" + ", no MLPs" * args.no_mlp
    every = [record for runs in results.values() for of_seeds in runs.values() for record in of_seeds]
    minutes = sum(record["seconds"] for record in every) / 60
    text = "\n\n".join([
        f"`python -m experiments.toy {shlex.join(arguments)}`",
        f"Mean ± standard deviation over seeds {seeds} after {args.steps:,} steps; 4 layers of 4 heads, width {args.n_embd}"
        f"{', the MLPs taken out' * args.no_mlp}; {made(every)}; "
        f"{minutes:.1f} minutes in all. Gradient norm: of the loss in the attention parameters of a layer, before clipping, "
        "mean over all steps.",
        *(part for problem in problems for part in (problem.describe(), table(problem, results[problem.name]))),
        f"![Losses and gradient norms]({os.path.basename(args.out)}.png)",
    ])  # fmt: skip
    write(f"{args.out}.md", text + "\n")
    print(text)
    save(draw(problems, results, title), f"{args.out}.png")


if __name__ == "__main__":
    cli(main)
