"""
Checkpoints fine-tuned on the tasks of GLUE, with several seeds, and the table of their scores.

    python -m experiments.glue out/MHA out/NagMHA --tasks cola rte --seeds 1 2 3 --out results/glue.json
    python -m experiments.glue out/x --tasks rte --source DIR --limit 500 --epochs 1

A text, or a pair of texts with a newline between them, ends with the end-of-text token. A fresh linear head reads the final
hidden state there, and the whole model is trained: AdamW, linear warm-up over the first tenth of the steps and then linear
decay to 0, cross entropy, or the squared error where the label is a number (stsb). Where tokens exceed block_size, the
longer text of the pair loses its end first, so a long premise does not push out the hypothesis.

The scores are those of the last step on the validation split (mnli: validation_matched), since the labels of the test split
are hidden; the scores choose no epoch. The data is nyu-mll/glue from the hub, or with --source a folder of that layout. To see
what pretraining gave, compare with an untrained checkpoint: train.py writes one with --max_iters=0.

Every finished fine-tuning is added to the JSON at --out and does not run again, so you can stop the command and repeat it. The
table goes beside the JSON as Markdown.
"""

import itertools
import math
import os
import shlex
import statistics
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
import train
from data import get_tokenizer
from device import pick_device, short_dtype
from experiments.arguments import parser_with
from experiments.records import Records, made, markdown, mean_sd, write
from files import sha256
from guard import UserError, cli

# The official metrics of each task; in the average a task counts with their mean.
TASKS = dict(cola=("Matthews",), sst2=("accuracy",), mrpc=("F1", "accuracy"), stsb=("Pearson", "Spearman"),
             qqp=("F1", "accuracy"), mnli=("accuracy",), qnli=("accuracy",), rte=("accuracy",), wnli=("accuracy",))  # fmt: skip


def load(source, task):
    """The training and the validation split of a task. Raises UserError."""
    import datasets

    try:
        return datasets.load_dataset(source, task, split=["train", "validation_matched" if task == "mnli" else "validation"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {task} from {source}: {' '.join(str(error).split())}; connect to the network, "
            "or give a local copy in the hub's layout with --source DIR"
        ) from None


def tokens(tokenizer, texts, block_size):
    """
    The ids of an example, a tuple of texts: newlines between the texts, end-of-text after the last; and how many ids were
    cut. A pair loses the end of its longer text until it fits.
    """
    parts = [tokenizer.encode_ordinary(text) for text in texts]
    excess = max(0, sum(map(len, parts)) + len(parts) - block_size)
    for _ in range(excess):
        max(parts, key=len).pop()
    ends = tokenizer.encode_ordinary("\n") * (len(parts) - 1) + [tokenizer.eot_token]
    return [token for part, end in zip(parts, ends, strict=True) for token in (*part, end)], excess


def encode(split, tokenizer, block_size):
    """A split's examples, 1-d tensors of ids; their labels, int64 classes or float32 numbers; the share that was cut."""
    texts = [split[name] for name in split.column_names if name not in ("label", "idx")]
    rows, cut = zip(*(tokens(tokenizer, pair, block_size) for pair in zip(*texts, strict=True)), strict=True)
    return [torch.tensor(row) for row in rows], torch.tensor(split["label"][:]), np.count_nonzero(cut) / len(cut)


def outputs(model, rows):
    """What the head says at the last token of each of rows: (len(rows), outputs), float32."""
    device = model.lm_head.weight.device
    idx = pad_sequence(rows, batch_first=True)  # on the right, where no token of a causal model looks
    T = idx.size(1)  # padded to a multiple of 16: on a CPU the kernels of every shape stay in memory
    idx = F.pad(idx, (0, min(-T % 16, model.config.block_size - T))).to(device)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=short_dtype(device.type) == "bfloat16"):
        return model.lm_head(model.hidden(idx)[torch.arange(len(rows), device=device), last]).float()


def batches(lengths, batch_size, rng):
    """
    The batches of one epoch in random order, as arrays of indices. The examples of a batch are of similar length: 16 batches
    at a time are cut out of a random permutation and sorted by length.
    """
    order, pool, result = rng.permutation(len(lengths)), 16 * batch_size, []
    for i in range(0, len(order), pool):
        part = order[i : i + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        result += [part[j : j + batch_size] for j in range(0, len(part), batch_size)]
    return [result[i] for i in rng.permutation(len(result))]


def finetune(model, rows, labels, settings, seed, title=""):
    """
    Give the model a head for these labels in the place of its token head, and train all of it on these examples. Returns
    the number of steps.
    """
    device, rng = model.lm_head.weight.device, np.random.default_rng(seed)
    chosen = rng.permutation(len(rows))[: settings["limit"]]
    classes = 1 if labels.is_floating_point() else int(labels.max()) + 1
    rows, labels, lengths = [rows[i] for i in chosen], labels[chosen].to(device), np.array([len(rows[i]) for i in chosen])
    steps = settings["epochs"] * math.ceil(len(rows) / settings["batch_size"])
    warmup = math.ceil(steps / 10)

    torch.manual_seed(seed)
    model.lm_head = nn.Linear(model.config.n_embd, classes)
    nn.init.normal_(model.lm_head.weight, std=0.02)  # as all weights of the model started
    nn.init.zeros_(model.lm_head.bias)
    model.to(device).train()
    cfg = train.Config(learning_rate=settings["learning_rate"], min_lr=0.0, weight_decay=settings["weight_decay"])
    (optimizer,) = train.optimizers(model, cfg, device.type)
    epochs = (batches(lengths, settings["batch_size"], rng) for _ in range(settings["epochs"]))
    bar = tqdm(itertools.chain.from_iterable(epochs), title, steps, leave=False, unit="step", disable=None)
    for step, batch in enumerate(bar):
        rate = cfg.learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        train.set_rate([optimizer], rate)
        said = outputs(model, [rows[i] for i in batch])
        loss = F.mse_loss(said[:, 0], labels[batch]) if classes == 1 else F.cross_entropy(said, labels[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return steps


@torch.no_grad()
def predict(model, rows, batch_size):
    """The likeliest class, or the number, that the model gives each of rows: a 1-d array."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    said = [outputs(model, [rows[j] for j in order[i : i + batch_size]]) for i in range(0, len(order), batch_size)]
    said = torch.cat(said).cpu()[np.argsort(order)]
    return (said[:, 0] if said.size(1) == 1 else said.argmax(1)).numpy()


def score(task, labels, predictions):
    """The task's metrics in percent, {name: value}. A constant has no correlation with the labels; 0 stands for it."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    def correlation(measure):
        return lambda labels, predictions: 0.0 if np.ptp(predictions) == 0 else measure(labels, predictions).statistic

    known = dict(
        accuracy=accuracy_score,
        F1=f1_score,
        Matthews=matthews_corrcoef,
        Pearson=correlation(pearsonr),
        Spearman=correlation(spearmanr),
    )
    return {metric: 100 * float(known[metric](labels, predictions)) for metric in TASKS[task]}


def chance(task, training, validation):
    """The scores of always predicting the training split's commonest label, be it a class or a number."""
    labels = validation["label"][:]
    return score(task, labels, np.full(len(labels), statistics.mode(training["label"])))


def describe(folder, name, dropout):
    """What identifies the checkpoint folder/name, as a dict. Raises UserError if it does not load."""
    path = os.path.join(folder, name)
    state = checkpoint.load_model(path, dropout=dropout)[1]
    system = dict(checkpoint=folder, variant=state["model_config"]["variant"])
    return system | dict(step=state["step"], tokenizer=state["tokenizer"], sha256=sha256(path))


def run(model, task, training, validation, settings, seed, title):
    """Fine-tune the model and score it: dict(scores, seconds of training, numbers of examples, share of them cut)."""
    (rows, labels, cut), (tests, truth, _) = training, validation
    start = time.perf_counter()
    steps = finetune(model, rows, labels, settings, seed, title)
    seconds = time.perf_counter() - start
    scores = score(task, truth.numpy(), predict(model, tests, settings["batch_size"]))
    return dict(scores=scores, steps=steps, seconds=seconds, training=len(rows), validation=len(tests), cut=cut)


def table(rows, tasks):
    """Markdown: a line for each system, its average over tasks last; rows: {system: {task: [scores of a seed, ...]}}."""
    lines = []
    for system, scores in rows.items():
        cells = [" / ".join(mean_sd([seed[m] for seed in scores[task]], ".1f") for m in TASKS[task]) for task in tasks]
        seeds = zip(*([statistics.mean(seed.values()) for seed in scores[task]] for task in tasks), strict=True)
        lines.append([system, *cells, mean_sd([statistics.mean(seed) for seed in seeds], ".1f")])
    return markdown(["checkpoint", *(f"{task}: {' / '.join(TASKS[task])}" for task in tasks), "average"], lines)


def main(arguments):
    parser = parser_with(__doc__, ckpt="best.pt", seeds=[1, 2, 3], device="auto")
    parser.add_argument("out_dirs", nargs="+", help="folders of the checkpoints")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"some of {', '.join(TASKS)}; default: all")
    parser.add_argument("--source", default="nyu-mll/glue", help="folder of a local copy in the hub's layout")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="highest rate")
    parser.add_argument("--weight_decay", type=float, default=0.1, help="of matrices and embeddings")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of activations dropped")
    parser.add_argument("--limit", type=int, help="at most this many training examples, drawn by the seed; default: all")
    parser.add_argument("--out", default="results/glue.json", help="JSON that results are added to; the table goes beside it")
    args = parser.parse_args(arguments)
    positive = ("epochs", "batch_size", "learning_rate", "limit")
    problems = [f"--{k} {v} must be positive" for k, v in vars(args).items() if k in positive and v is not None and v <= 0]
    if not 0 <= args.weight_decay < math.inf:
        problems.append(f"--weight_decay {args.weight_decay} must be at least 0 and finite")
    if unknown := [task for task in args.tasks if task not in TASKS]:
        problems.append(f"--tasks {' '.join(unknown)}: GLUE has {', '.join(TASKS)}")
    if problems:
        raise UserError("\n".join(problems))

    # all errors come before the first run
    device = pick_device(args.device)
    names = ("source", "epochs", "batch_size", "learning_rate", "weight_decay", "dropout", "limit")
    settings = {name: getattr(args, name) for name in names}
    made_with, records = checkpoint.made_with(device), Records(args.out)
    systems = {folder: describe(folder, args.ckpt, args.dropout) for folder in args.out_dirs}
    splits = {task: load(args.source, task) for task in args.tasks}

    rows, cut = {"majority class": {task: [chance(task, *splits[task])] for task in args.tasks}}, {}
    shown = []
    with records:
        for (task, data), (folder, system) in itertools.product(splits.items(), systems.items()):
            name, encoded = f"`{folder}`, {system['variant']}, {system['step']:,} steps", None
            for seed in args.seeds:
                unit = dict(sha256=system["sha256"], task=task, seed=seed, settings=settings)
                record = records.find(unit)
                if record is None:
                    model, _ = checkpoint.load_model(os.path.join(folder, args.ckpt), device, dropout=args.dropout)
                    tokenizer = get_tokenizer(system["tokenizer"])
                    encoded = encoded or [encode(split, tokenizer, model.config.block_size) for split in data]
                    found = run(model, task, *encoded, settings, seed, f"{folder} {task} {seed}")
                    record = records.add(system | unit | made_with | found)
                    print(f"{folder} {task} {seed}: " + ", ".join(f"{k} {v:.1f}" for k, v in record["scores"].items()))
                rows.setdefault(name, {}).setdefault(task, []).append(record["scores"])
                cut.setdefault(task, []).append(record["cut"])
                shown.append(record)

    text = "\n".join([
        f"`python -m experiments.glue {shlex.join(arguments)}`\n",
        "GLUE's validation splits (mnli: validation_matched), percent, after the last step; mean ± standard deviation over "
        f"seeds {', '.join(map(str, args.seeds))}. {args.epochs} epochs of "
        + (f"at most {args.limit:,}" if args.limit else "all")
        + f" training examples, {args.batch_size} per step, learning rate {args.learning_rate:g}, weight decay "
        f"{args.weight_decay:g}, dropout {args.dropout:g}. Share of the training split cut to the context: "
        + ", ".join(f"{task} " + " to ".join(dict.fromkeys(f"{f(of):.1%}" for f in (min, max))) for task, of in cut.items())
        + f". Made on {made(shown)}.\n",
        table(rows, args.tasks),
    ])  # fmt: skip
    write(os.path.splitext(args.out)[0] + ".md", text)
    print(text)


if __name__ == "__main__":
    cli(main)
