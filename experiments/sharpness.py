"""
How sharp the minima are in which runs ended: trace and largest eigenvalue of the Hessian of the loss, for each checkpoint.

    python -m experiments.sharpness out/a out/b out/c --out results/sharpness

The loss is the mean over --batches batches of --batch_size fixed windows of text, spread evenly over the training split,
whose loss the optimizer saw; --split val takes unseen text. Everything is float32, without dropout. The table goes to
--out.md, the numbers to --out.json; a checkpoint that stands there with the same settings isn't computed again. Runs that
differ only in their seeds are also summarised. [Gai] (arXiv 2605.24425) reports that momentum in depth ends in
flatter minima; compare runs of one data set and budget, since both numbers fall and rise with the loss and the scale of
the weights.
"""

import os
import statistics
from collections import defaultdict
from dataclasses import asdict

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import checkpoint
from data import fingerprint, read_meta
from device import pick_device
from experiments.arguments import parser_with
from experiments.records import Records, made, markdown, mean_sd, text_of, windows, write
from files import sha256
from guard import UserError, cli
from log import system
from model import OF_MHA
from train import Config

# knobs of train.py that do not change what a run learns
BOOKS = set("any_tokenizer compile data_dir device eval_interval eval_iters eval_only log_interval logger logger_name "
            "logger_project on_spike out_dir overwrite seed timeout verify".split())  # fmt: skip


def mean_loss(model, batches):
    """Mean of the loss over all windows, nats per token. batches: pairs of idx and targets, (B, T) each."""
    windows = sum(len(x) for x, _ in batches)
    with torch.no_grad():
        return sum(model(x, y)[1].item() * len(x) / windows for x, y in batches)


def hessian_product(model, batches, v):
    """
    H v for the Hessian H of mean_loss in all parameters; v and the result are flat, in the order of parameters(). By
    double backward: H v is the gradient of g.v, where g is that of the loss. Attention must be the plain one, since no fused
    kernel can be differentiated twice.
    """
    parameters, windows = list(model.parameters()), sum(len(x) for x, _ in batches)
    Hv = torch.zeros_like(v)
    for x, y in batches:
        with sdpa_kernel(SDPBackend.MATH):
            _, loss = model(x, y)
            g = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        gv = torch.cat([t.flatten() for t in g]) @ v
        Hv += parameters_to_vector(torch.autograd.grad(gv, parameters, materialize_grads=True)) * (len(x) / windows)
    return Hv


def trace(product, like, probes, generator):
    """
    Hutchinson's estimate of tr H = E[z.Hz], z of random signs: its mean over the probes and the standard error of that.
    product: v -> H v. like: a tensor of v's shape.
    """
    signs = (torch.randint(2, like.shape, generator=generator).to(like) * 2 - 1 for _ in range(probes))
    estimates = [(z @ product(z)).item() for z in signs]
    return statistics.mean(estimates), statistics.stdev(estimates) / probes**0.5


def largest_eigenvalue(product, like, iterations, generator):
    """
    Lanczos' estimates of H's largest eigenvalue, a lower bound of it after each iteration, starting with the first. Three
    vectors are kept, none made orthogonal again: lost orthogonality repeats eigenvalues and leaves the largest where it is.

        beta_{k+1} q_{k+1} = H q_k - alpha_k q_k - beta_k q_{k-1}        alpha_k = q_k.H q_k
    """
    q = torch.randn(like.shape, generator=generator).to(like)
    before, q, alphas, betas, estimates = torch.zeros_like(q), q / q.norm(), [], [0.0], []
    for _ in range(iterations):
        w = product(q) - betas[-1] * before
        alphas.append((q @ w).item())
        w -= alphas[-1] * q
        T = torch.tensor(alphas, dtype=torch.float64).diag() + torch.tensor(betas[1:], dtype=torch.float64).diag(-1)
        estimates.append(torch.linalg.eigvalsh(T)[-1].item())  # which reads the lower triangle alone
        betas.append(w.norm().item())
        before, q = q, w / betas[-1]
    return estimates


def measure(model, state, folder, args, device, step):
    """The numbers of one checkpoint on the text in folder, a dict; it calls step() before each product."""
    cfg, count = state["config"], args.batches * args.batch_size
    xy = [t.to(device).split(args.batch_size) for t in windows(folder, args.split, count, state)]
    batches = list(zip(*xy, strict=True))
    like = parameters_to_vector(model.parameters()).detach()
    generator = torch.Generator().manual_seed(args.seed)

    def product(v):
        step()
        return hessian_product(model, batches, v)

    tr, error = trace(product, like, args.probes, generator)
    *_, last, eigenvalue = largest_eigenvalue(product, like, args.iterations, generator)
    return dict(
        system=system(state["model_config"]),
        model_config=state["model_config"],
        training={k: v for k, v in cfg.items() if k not in ("seed", "out_dir")},
        run_seed=cfg["seed"],
        step=state["step"],
        tokens=sum(x.numel() for x, _ in batches),
        parameters=len(like),
        loss=mean_loss(model, batches),
        trace=tr,
        trace_error=error,
        trace_per_parameter=tr / len(like),
        eigenvalue=eigenvalue,
        eigenvalue_change=abs(eigenvalue - last) / abs(eigenvalue),
        **checkpoint.made_with(device),
    )


def table(records, args):
    """The Markdown: a line for each run and, if a system has several runs, a line for each system."""
    first = records[0]
    text = (
        f"Hessian of the loss on {args.batches} x {args.batch_size} windows ({first['tokens']:,} tokens) of the {args.split} "
        f"split, all parameters, float32, no dropout. Trace: Hutchinson's estimate ± standard error over {args.probes} "
        f"random signs; largest eigenvalue: after {args.iterations} Lanczos iterations, with its relative change in the last "
        f"one; seed {args.seed}. Measured on {made(records)}.\n\n"
    )
    rows, systems = [], defaultdict(list)
    # a system's name says its variant and choices; what else differs, sizes or learning rates, is added. A knob that is newer
    # than a run counts as its default, and a resumed run as one from scratch.
    settings = [asdict(Config()) | r["training"] | r["model_config"] for r in records]
    settings = [s | dict(init_from=s["init_from"].replace("resume", "scratch")) for s in settings]
    said = {"variant", *OF_MHA, *BOOKS}
    varied = [k for k in settings[0] if k not in said and any(s[k] != settings[0][k] for s in settings)]
    names = [r["system"] + "".join(f" --{k}={s[k]}" for k in varied) for r, s in zip(records, settings, strict=True)]
    for r, name in zip(records, names, strict=True):
        rows.append([r["run"], name, r["run_seed"], f"{r['step']:,}", f"{r['loss']:.4f}",
                     f"{r['trace']:.4g} ± {r['trace_error']:.2g}", f"{r['trace_per_parameter']:.3g}",
                     f"{r['eigenvalue']:.4g}", f"{r['eigenvalue_change']:.0e}"])  # fmt: skip
        systems[name, r["step"]].append(r)
    numbers = ["step", "loss, nats per token", "trace", "trace per parameter", "largest eigenvalue"]
    text += markdown(["run", "system", "seed", *numbers, "change"], rows)
    if len(systems) < len(records):
        forms = dict(loss=".4f", trace=".4g", trace_per_parameter=".3g", eigenvalue=".4g")
        rows = [[name, len(runs), f"{step:,}", *(mean_sd([r[k] for r in runs], form, ".2g") for k, form in forms.items())]
                for (name, step), runs in systems.items()]  # fmt: skip
        text += "\nMean ± standard deviation over the runs of one system:\n\n"
        text += markdown(["system", "runs", *numbers], rows)
    return text


def main(arguments):
    parser = parser_with(__doc__, ckpt="ckpt.pt", split="train", data_dir=None, device="auto")
    parser.add_argument("runs", nargs="+", help="folders of runs of train.py")
    parser.add_argument("--batches", type=int, default=8, help="number of batches of windows; the loss is their mean")
    parser.add_argument("--batch_size", type=int, default=4, help="windows in a batch")
    parser.add_argument("--probes", type=int, default=16, help="random vectors for the trace")
    parser.add_argument("--iterations", type=int, default=20, help="Lanczos iterations for the eigenvalue")
    parser.add_argument("--seed", type=int, default=0, help="of the probes and of Lanczos' first vector")
    parser.add_argument("--out", default="results/sharpness", help="the .md and .json to write, without the ending")
    args = parser.parse_args(arguments)
    for name, least in dict(batches=1, batch_size=1, probes=2, iterations=2).items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    device = pick_device(args.device)

    records, products = [], len(args.runs) * (args.probes + args.iterations)
    with Records(f"{args.out}.json") as known, tqdm(total=products, unit="product", disable=None) as bar:
        for run in args.runs:
            path = os.path.join(run, args.ckpt)
            model, state = checkpoint.load_model(path, device)
            folder = text_of(state, args.data_dir)
            settings = ("ckpt", "batches", "batch_size", "probes", "iterations", "seed", "split")
            identity = dict(run=run, sha256=sha256(path), data=fingerprint(read_meta(folder)))
            identity |= {k: getattr(args, k) for k in settings}
            before, about = bar.n, (model, state, folder)
            records.append(known.find_or(identity, lambda about=about: measure(*about, args, device, bar.update)))
            bar.update(before + args.probes + args.iterations - bar.n)  # a record that was found counts as done
    text = table(records, args)
    write(f"{args.out}.md", text)
    print(text)


if __name__ == "__main__":
    cli(main)
