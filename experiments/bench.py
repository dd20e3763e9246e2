"""
What each variant costs, compared with nanoGPT.

    python -m experiments.bench steps --peak                                    all variants: training step and its memory
    python -m experiments.bench lengths --variants MHA MHA2nd1st LinearMHA      time per token by sequence length
    python -m experiments.bench memory                                          peak memory by depth, plain and reversible
    python -m experiments.bench loss --vocab_size 50304                         the loss with and without the table of logits
    python -m experiments.bench taylor out/newton                               size of MHA2nd1st's correction by length

The things to compare run in turn, and a time is a median, since a busy machine slows all of them at once. The row nanoGPT is
github.com/karpathy/nanoGPT as a user runs it, in a process of its own. On a CPU it is float32, not compiled, with AdamW not
fused; on CUDA it is bfloat16, compiled and fused; on both it generates without a cache. --nanogpt DIR is a clone of it; without
one MHA takes its place and runs in the same way. Results are added to --out, a JSON list. experiments.bars has the promises.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import checkpoint
import model as definition
from device import keep_memory, short_dtype
from experiments.arguments import parser_with
from experiments.plot import line, new_figure, save
from experiments.records import Records, markdown, text_of, windows
from guard import UserError, cli
from model import GPT, VARIANTS, GPTConfig, causal
from train import Loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")  # as train.py and nanoGPT do
NANOGPT = "nanoGPT"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
BYTES = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=257, batch_size=16)
POLYAK = dict(momentum="polyak", momentum_on="both", beta=0.9)  # what reversible can invert


# ----------------------------------------------------------------------------------------------------------------------
# what is measured


def build(args, name, **choices):
    """The model of a row, a variant or nanoGPT, and a function from inputs and targets to its loss."""
    torch.manual_seed(0)
    sizes = {size: getattr(args, size) for size in SIZES}
    if name != NANOGPT:
        if DEVICE == "cpu":
            keep_memory()  # as train.py does
        model = GPT(GPTConfig(bias=False, **sizes | dict(variant=name) | choices)).to(DEVICE)
        loss, whole = Loss(model), not model.config.reversible  # a reversible model leaves the compiler
        return model, torch.compile(loss, dynamic=False, fullgraph=whole) if args.compile else loss
    if args.nanogpt:
        spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(args.nanogpt, "model.py"))
        nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        with contextlib.redirect_stdout(io.StringIO()):
            model = nanogpt.GPT(nanogpt.GPTConfig(bias=False, dropout=0.0, **sizes))
    else:  # the process runs this row alone, so the change reaches no other
        definition.sdpa = F.scaled_dot_product_attention
        model = GPT(GPTConfig(bias=False, **sizes))
    running = torch.compile(model.to(DEVICE), dynamic=False) if DEVICE == "cuda" else model
    return model, lambda idx, targets: running(idx, targets)[1]


def synchronized():
    """The time after all work on the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(args, name, loss_of=None, **choices):
    """
    A function that takes one training step on random tokens; it returns the seconds of forward, backward and the whole step.
    loss_of: computes the loss from the head's inputs, the head's weight and the targets, in place of the model.
    """
    model, running = build(args, name, **choices)
    plain = name == NANOGPT and DEVICE == "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not plain)
    idx = torch.randint(args.vocab_size, (args.batch_size, args.block_size), device=DEVICE)
    dtype = getattr(torch, "float32" if plain else args.dtype)

    def step(idx=idx):
        times = [synchronized()]
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            value = loss_of(model.hidden(idx), model.lm_head.weight, idx) if loss_of else running(idx, idx)
        times.append(synchronized())
        value.backward()
        times.append(synchronized())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(synchronized())
        return times[1] - times[0], times[2] - times[1], times[3] - times[0]

    step.gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return step


def generation(args, name, batch=1):
    """A function that generates args.new_tokens after one token, in each row of a batch; it returns the seconds."""
    model, _ = build(args, name)
    model.eval()

    @torch.no_grad()
    @torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")
    def generate():
        idx, start = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE), synchronized()
        if name != NANOGPT:
            model.generate(idx, args.new_tokens, top_k=200)
        else:  # each new token takes a pass over all tokens before it
            for _ in range(args.new_tokens):
                logits = model(idx[:, -args.block_size :])[0][:, -1]
                logits[logits < logits.topk(min(200, args.vocab_size)).values[:, -1:]] = -math.inf
                idx = torch.cat((idx, logits.softmax(-1).multinomial(1)), 1)
        return synchronized() - start

    return generate


def peak(step):
    """MB that a training step holds at once beyond weights and optimizer state: activations and gradients."""
    step()  # makes the optimizer state
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(trace)
        with open(trace) as file:
            events = [e["args"] for e in json.load(file)["traceEvents"] if e["name"] == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return (max(e["Total Allocated"] for e in events) - before) / 2**20


def serve(pipe, make, arguments):
    function = make(*arguments)
    with contextlib.suppress(EOFError):  # nobody asks any more
        while pipe.recv():
            pipe.send(function())


def elsewhere(make, *arguments):
    """The function make(*arguments), made and called in a process of its own."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(there, make, arguments), daemon=True).start()
    there.close()

    def function():
        try:
            here.send(True)
            return here.recv()
        except (EOFError, OSError):
            raise UserError(f"the process of {make.__name__}{arguments[1:]} ended: its error is above") from None

    return function


def alternating(functions, rounds, warm_up):
    """{name: [what it returned in each round]}; a round calls the functions in turn."""
    torch._dynamo.config.recompile_limit = 8 * len(functions)  # all models share the code of one forward
    for function in tqdm(functions.values(), "warming up", leave=False, disable=None):
        for _ in range(warm_up):
            function()
    found = {name: [] for name in functions}
    for _ in tqdm(range(rounds), "rounds", leave=False, disable=None):
        for name, function in functions.items():
            found[name].append(function())
    return found


def rows(make, args, names):
    """{name: make(args, name)}, nanoGPT's in a process of its own."""
    return {name: elsewhere(make, args, name) if name == NANOGPT else make(args, name) for name in names}


# ----------------------------------------------------------------------------------------------------------------------
# the commands


def steps(args):
    """Median seconds of forward, backward, step and generation for each row; for variants peak memory in MB too."""
    names = [NANOGPT, *args.variants]
    times = alternating(rows(training_step, args, names), args.rounds, warm_up=2)
    result = {}
    for name in names:
        forward, backward, step = (statistics.median(t) for t in zip(*times[name], strict=True))
        result[name] = dict(forward=forward, backward=backward, step=step)
    if args.new_tokens:
        for name, seconds in alternating(rows(generation, args, names), args.generations, warm_up=0).items():
            result[name]["generation"] = statistics.median(seconds)
    for name in tqdm(args.variants, "memory", leave=False, disable=None) if args.peak else ():
        result[name]["peak_mb"] = peak(training_step(args, name))
    tokens, base = args.batch_size * args.block_size, result[args.variants[0]]
    head = ["row", "forward, s", "backward, s", "step, s", f"over {args.variants[0]}", "tokens/s over nanoGPT's"]
    table = [[name, f"{r['forward']:.3f}", f"{r['backward']:.3f}", f"{r['step']:.3f}", f"{r['step'] / base['step']:.2f}",
              f"{result[NANOGPT]['step'] / r['step']:.2f}"] for name, r in result.items()]  # fmt: skip
    for key, title in dict(peak_mb="peak, MB", generation=f"{args.new_tokens} new tokens, s").items():
        if key in base:
            head.append(title)
            for row in table:
                row.append(f"{result[row[0]][key]:.3g}" if key in result[row[0]] else "")
    print(f"{tokens:,} tokens per step\n\n" + markdown(head, table))
    return result


def lengths(args):
    """Microseconds per token of a training step by variant and length, at one number of tokens per step; and a figure."""
    tokens = args.batch_size * args.block_size
    sizes = {T: argparse.Namespace(**vars(args) | dict(block_size=T, batch_size=max(1, tokens // T))) for T in args.lengths}
    result = {name: {} for name in args.variants}
    for name, points in result.items():
        times = alternating({T: training_step(sizes[T], name) for T in sizes}, args.rounds, warm_up=2)
        for T in sizes:
            points[T] = statistics.median(step for *_, step in times[T]) / (sizes[T].batch_size * T) * 1e6
    table = [[name, *(f"{t:.1f}" for t in r.values())] for name, r in result.items()]
    print(markdown(["microseconds per token", *args.lengths], table))
    fig, ax = new_figure()
    for i, (name, points) in enumerate(result.items()):
        ax.plot(points.keys(), points.values(), marker="o", label=name, **line(i))
    ax.set(xlabel="tokens in a sequence", ylabel="training step, microseconds per token", xscale="log", ylim=0)
    ax.set_xticks(args.lengths, args.lengths)
    ax.minorticks_off()
    ax.set_title(f"{args.n_layer} layers, width {args.n_embd}, {tokens:,} tokens per step, {DEVICE} {args.dtype}")
    ax.legend(ncols=2)
    save(fig, os.path.splitext(args.out)[0] + "_lengths.png")
    return result


def memory(args):
    """Peak MB of activations and gradients by depth, for polyak on both sublayers, plain and reversible; a figure."""
    result = {}
    for reversible in (False, True):
        points = result.setdefault("reversible" if reversible else "plain", {})
        for n_layer in args.depths:
            points[n_layer] = peak(training_step(args, "MHA", **POLYAK, reversible=reversible, n_layer=n_layer))
    fig, ax = new_figure()
    for i, (name, points) in enumerate(result.items()):
        ax.plot(points.keys(), points.values(), marker="o", label=name, **line(i))
        print(name, {n: round(mb) for n, mb in points.items()})
    ax.set(xlabel="layers", ylabel="peak of activations and gradients (MB)", ylim=0, xticks=args.depths)
    ax.set_title(f"width {args.n_embd}, {args.batch_size} x {args.block_size} tokens")
    ax.legend()
    save(fig, os.path.splitext(args.out)[0] + "_memory.png")
    return result


def loss(args):
    """
    Seconds and peak MB of a step of MHA for three ways to compute the loss: from all logits, as the model does; from a chunk
    of tokens at a time, by torch's linear_cross_entropy; or by checkpointing the head for each chunk. Not compiled.
    """
    short = getattr(torch, args.dtype)

    def whole(x, W, targets):
        return F.cross_entropy(F.linear(x, W).flatten(0, 1), targets.flatten())

    def chunked(x, W, targets):
        x, options = x.flatten(0, 1).to(short), torch.nn.LinearCrossEntropyOptions(batch_chunk_size=args.loss_chunk)
        return F.linear_cross_entropy(x, W.to(short), targets.flatten(), options=options)

    def checkpointed(x, W, targets):
        def part(x, W, targets):
            return F.cross_entropy(F.linear(x, W), targets, reduction="sum")

        parts = zip(x.flatten(0, 1).split(args.loss_chunk), targets.flatten().split(args.loss_chunk), strict=True)
        total = sum(torch.utils.checkpoint.checkpoint(part, x, W, t, use_reentrant=False) for x, t in parts)
        return total / targets.numel()

    ways = {"all logits": whole, "F.linear_cross_entropy": chunked, "checkpointed": checkpointed}
    if not hasattr(F, "linear_cross_entropy"):
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: that way is left out")
        del ways["F.linear_cross_entropy"]
    functions = {way: training_step(args, "MHA", function) for way, function in ways.items()}
    result = {way: dict(step=statistics.median(step for *_, step in times))
              for way, times in alternating(functions, args.rounds, warm_up=2).items()}  # fmt: skip
    for way, step in functions.items():
        result[way]["peak_mb"] = peak(step)
    print(
        markdown(["loss", "step, s", "peak, MB"], [[w, f"{r['step']:.3f}", f"{r['peak_mb']:.0f}"] for w, r in result.items()])
    )
    return result


def correction(attn, x):
    """
    Three tensors (nh, T) for MHA2nd1st's attention at x, (1, T, C): |sum_j p_j s_j v_j| / |sum_j p_j v_j|, and the share
    of weights p_j (1 + tau s_j) that are negative, with tau as learned and with tau = 1; for each head and position.
    """
    q, k, v = (t[0].float() for t in attn.qkv(x))
    T = attn.sqrt_hs
    logits = q @ k.mT / T
    seen = causal(logits)
    p = logits.masked_fill(~seen, -math.inf).softmax(-1)
    u = p @ k - q
    s = (u @ k.mT - (u * (p @ k)).sum(-1, keepdim=True)) / T
    size = ((p * s) @ v).norm(dim=-1) / (p @ v).norm(dim=-1)
    return size, *(((1 + tau * s < 0) & seen).sum(-1) / seen.sum(-1) for tau in (attn.tau(), 1.0))


@torch.no_grad()
def taylor(args):
    """
    Does MHA2nd1st's Taylor correction stay small in long contexts? The table has means over the last eighth of the first T
    positions, over layers, heads and --sequences validation windows; and the largest mean that one head of a layer has.
    """
    if not args.checkpoint:
        raise UserError("bench taylor needs a checkpoint: give the out_dir of a run with --curvature=newton")
    model, state = checkpoint.load_model(os.path.join(args.checkpoint, "best.pt"), DEVICE)
    if model.config.curvature != "newton":
        raise UserError(f"{args.checkpoint} has curvature={model.config.curvature}: train one with --curvature=newton")
    found = []  # (layers, 3, nh, T) of each sequence
    for idx in windows(text_of(state), "val", args.sequences, state)[0].to(DEVICE):
        seen = []

        def look(attn, inputs, seen=seen):
            seen.append(torch.stack(correction(attn, *inputs[:1])))

        hooks = [block.attn.register_forward_pre_hook(look) for block in model.transformer.h]
        model(idx[None])
        for hook in hooks:
            hook.remove()
        found.append(torch.stack(seen))
    found, rows, result = torch.stack(found).mean(0), [], {}
    for T in [T for T in args.lengths if T <= model.config.block_size] or [model.config.block_size]:
        at = found[..., T - T // 8 : T].mean(-1)  # (layers, 3, nh)
        size, negative, negative_1 = at.mean((0, 2)).tolist()
        largest = at[:, 0].max().item()
        result[T] = dict(size=size, largest=largest, negative=negative, negative_at_tau_1=negative_1)
        rows.append([T, f"{size:.3f}", f"{largest:.3f}", f"{negative:.2%}", f"{negative_1:.2%}"])
    tau = torch.cat([torch.as_tensor(block.attn.tau()).flatten() for block in model.transformer.h])
    print(f"tau: mean {tau.mean():.3f}, from {tau.min():.3f} to {tau.max():.3f}\n")
    print(markdown(["length", "|sum p s v| / |v̄|", "largest head", "negative weights", "negative at tau = 1"], rows))
    return dict(model_config=state["model_config"], step=state["step"], tau=tau.tolist(), lengths=result)


def record(args, what, result):
    """What is kept of a measurement."""
    made = checkpoint.made_with(DEVICE) | dict(threads=torch.get_num_threads())
    return dict(what=what, arguments=vars(args), made_with=made, result=result)


def main(arguments):
    parser = parser_with(__doc__, nanogpt=None, compile=False, dtype=short_dtype(DEVICE))
    parser.add_argument("what", choices=("steps", "lengths", "memory", "loss", "taylor"))
    parser.add_argument("checkpoint", nargs="?", help="taylor: the folder of a run")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="the first is what the others are compared with")
    parser.add_argument("--depths", nargs="+", type=int, default=[6, 12, 24, 48])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096])
    for size, value in (BYTES | dict(rounds=9, new_tokens=0, generations=3, sequences=8, loss_chunk=256)).items():
        parser.add_argument(f"--{size}", type=int, default=value)
    parser.add_argument("--peak", action="store_true", help="steps: measure the variants' peak memory")
    parser.add_argument("--out", default="results/bench.json", help="the list that the result is added to")
    args = parser.parse_args(arguments)
    if unknown := set(args.variants) - set(VARIANTS):
        raise UserError(f"no variant is named {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    Records(args.out)  # if it cannot be read, the error comes before the work
    result = dict(steps=steps, lengths=lengths, memory=memory, loss=loss, taylor=taylor)[args.what](args)
    with Records(args.out) as records:
        records.add(record(args, args.what, result))


if __name__ == "__main__":
    cli(main)
