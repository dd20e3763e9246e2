"""
What a checkpoint knows: its accuracy on tasks of lm-evaluation-harness, and the perplexity of any text.

    python -m experiments.evaluate out/demo --tasks hellaswag,arc_easy
    python -m experiments.evaluate out/mha out/nag --tasks hellaswag --limit 200 --data ../hub
    python -m experiments.evaluate out/demo --text book.txt

The model answers in float32, without examples (zero-shot) unless --num_fewshot says otherwise. The name of a group of tasks
stands for all of them. The command prints the numbers as a Markdown table and keeps them in --out. It does not compute again
what --out has for the same file and the same question.
"""

import difflib
import functools
import hashlib
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
from data import get_tokenizer
from device import pick_device
from experiments.arguments import parser_with
from experiments.records import Records
from files import sha256
from guard import UserError, cli

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    sys.exit(f"error: evaluation needs lm-evaluation-harness ({error}): pip install lm-eval")


class Adapter(TemplateLM):
    """A GPT that answers the harness, which asks for log probabilities of texts, in nats, and for new texts."""

    def __init__(self, model, tokenizer, batch_size=16):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._device = model.lm_head.weight.device

    @property
    def eot_token_id(self):
        return self.tokenizer.eot_token

    def tok_encode(self, string, add_special_tokens=None):
        return self.tokenizer.encode_ordinary(string)

    def windows(self, context, continuation):
        """
        context, continuation: lists of tokens. The windows that predict the continuation, as pairs of inputs and targets of at
        most block_size tokens; a target of -1 does not count. A context that is too long loses its start. A continuation
        that is too long by itself is cut into windows, which predict each of its tokens once, the first token from the
        context's last one.
        """
        T = self.model.config.block_size
        if 0 < len(continuation) <= T:
            pairs = [(context, continuation)]
        else:
            pairs = map(make_disjoint_window, get_rolling_token_windows(continuation, context[-1], T, context_len=1))
        for context, continuation in pairs:
            tokens = (context + continuation)[-T - 1 :]
            yield tokens[:-1], [-1] * (len(tokens) - 1 - len(continuation)) + continuation

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """
        requests: triples (ignored, context of at least one token, continuation). Returns for each the log probability of
        its continuation and whether greedy decoding gives that continuation.
        """
        windows = [(i, x, y) for i, (_, *pair) in enumerate(requests) for x, y in self.windows(*pair)]
        windows.sort(key=lambda window: -len(window[1]))  # similar lengths together, the longest (most memory) first
        total, greedy = [0.0] * len(requests), [True] * len(requests)
        with tqdm(total=len(windows), unit="window", disable=disable_tqdm or None) as bar:
            for start in range(0, len(windows), self.batch_size):
                owners, x, y = zip(*windows[start : start + self.batch_size], strict=True)
                # padding comes last, where no position that is read looks
                x = pad_sequence([torch.tensor(row) for row in x], batch_first=True).to(self.device)
                y = pad_sequence([torch.tensor(row) for row in y], batch_first=True, padding_value=-1).to(self.device)
                asked = y >= 0  # the positions whose logits are read; the others get none
                logits = self.model.lm_head(self.model.hidden(x)[asked])
                nats, likeliest = logits.new_zeros(y.shape), torch.ones_like(asked)
                nats[asked] = F.cross_entropy(logits, y[asked], reduction="none")
                likeliest[asked] = logits.argmax(-1) == y[asked]
                nats, likeliest = nats.sum(1), likeliest.all(1)
                for i, n, all_likeliest in zip(owners, nats.tolist(), likeliest.tolist(), strict=True):
                    total[i] -= n
                    greedy[i] &= all_likeliest
                bar.update(len(owners))
        return list(zip(total, greedy, strict=True))

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log probability of each whole text, its first token predicted from the end-of-text token."""
        texts = [(None, [self.eot_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [total for total, _ in self._loglikelihood_tokens(texts, disable_tqdm)]

    def generate_until(self, requests, disable_tqdm=False):
        """
        What the model writes after each context, up to the first of the strings `until` or the end of the text: the
        likeliest tokens, or samples if do_sample or a temperature asks for them. One context at a time: lengths differ.
        """
        texts = []
        for context, choices in tqdm([r.args for r in requests], unit="text", disable=disable_tqdm or None):
            choices = normalize_gen_kwargs(choices)
            prompt = self.tok_encode(context) or [self.eot_token_id]
            temperature = choices.get("temperature", 1.0) if choices["do_sample"] else 0
            top_k = max(0, choices.get("top_k") or 0) or None  # 0 and -1 mean all
            start, top_p = torch.tensor([prompt], device=self.device), choices.get("top_p", 1.0)
            text = self.model.generate(start, choices["max_gen_toks"], temperature, top_k, self.eot_token_id, top_p)
            tokens = text[0, len(prompt) :].tolist()
            # the token table may have more rows than the tokenizer has tokens
            text = self.tokenizer.decode([t for t in tokens if t < self.tokenizer.n_vocab and t != self.eot_token_id])
            texts.append(postprocess_generated_text(text, choices["until"], None))
        return texts


@functools.cache
def task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads the harness's thousands of task files: some ten seconds


def tasks_of(name):
    """The names of the tasks that a task, a group or a tag of the harness stands for. Raises UserError."""
    entry = task_manager().task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, task_manager().task_index, n=3)
        raise UserError(f"lm-eval has no task or group named {name}" + (f"; it has {', '.join(near)}" if near else ""))
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    parts = entry.cfg["task"] if entry.kind.name == "GROUP" else []
    names = [part if isinstance(part, str) else part["task"] for part in ([parts] if isinstance(parts, str) else parts)]
    return [task for part in names for task in tasks_of(part)] or [name]


def get_task(name, data, num_fewshot=0):
    """
    The harness's task of this name, with num_fewshot examples before each question. data: None, or a folder with copies of the
    hub's data sets, OWNER/NAME as data/NAME. Without examples a copy needs only the split that is evaluated. Raises
    UserError.
    """
    choices = dict(task=name, num_fewshot=num_fewshot)
    if num_fewshot == 0:  # without `samples` the harness would read the examples' split, whether it needs any or not
        choices |= dict(fewshot_split=None, fewshot_config=dict(samples=[]))
    if data:
        choices["dataset_path"] = os.path.join(data, os.path.basename(task_manager().task_index[name].cfg["dataset_path"]))
        if not os.path.isdir(choices["dataset_path"]):
            raise UserError(f"--data {data} has no copy of {name}'s data: there is no folder {choices['dataset_path']}")
    try:
        return task_manager().load(dict(group="zero-shot", task=[choices]))["tasks"][name]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"cannot load the task {name} ({type(error).__name__}: {error}); --data takes a folder with copies of data sets"
        ) from None


def chance(task, docs):
    """The accuracy of guessing: the mean of 1 / number of choices, or None if the task isn't to choose one of several."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results is not None or task.multiple_target:
        return None
    return statistics.mean(1 / len(task.doc_to_choice(doc)) for doc in docs)


def evaluate_task(lm, task, data, limit, num_fewshot=0):
    """The metrics of a task over its first `limit` items (None: all): dict(n=items, metrics=[dict, ...], ...)."""
    name, task = task, get_task(task, data, num_fewshot)
    torch.manual_seed(0)  # for tasks that sample
    found = lm_eval.evaluate(lm, dict(tasks={name: task}), limit=limit)
    docs = [sample["doc"] for sample in found["samples"][name]]
    guessing, metrics = chance(task, docs), []
    for key, value in found["results"][name].items():
        metric, comma, way = key.partition(",")  # "way": how answers were read, none for log probabilities
        if comma and not metric.endswith("_stderr"):
            stderr = found["results"][name][f"{metric}_stderr,{way}"]
            metrics.append(dict(
                metric=metric if way == "none" else f"{metric} ({way})",
                value=value,
                stderr=None if stderr == "N/A" else stderr,
                chance=guessing if metric in ("acc", "acc_norm", "acc_bytes") else None,
            ))  # fmt: skip
    return dict(n=found["n-samples"][name]["effective"], unit="items", version=found["versions"][name], metrics=metrics)


def read_text(path):
    """The text of a file in UTF-8. Raises UserError if there is none."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}") from None
    if not text:
        raise UserError(f"{path} is empty: give a text")
    return text


def evaluate_text(lm, text):
    """The perplexity of a text as one document, each token with at most block_size before it; a dict as evaluate_task()'s."""
    tokens, (total,) = len(lm.tok_encode(text)), lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    values = {"perplexity per token": math.exp(-total / tokens), "bits per byte": -total / math.log(2) / len(text.encode())}
    return dict(n=tokens, unit="tokens", metrics=[dict(metric=m, value=v, stderr=None, chance=None) for m, v in values.items()])


def table(records):
    """A Markdown table with a line for each metric."""
    lines = ["| checkpoint | system | step | task | over | metric | value | chance |", "|---|---|--:|---|--:|---|--:|--:|"]
    for r in records:
        for m in r["metrics"]:
            value = f"{m['value']:.4f}" + ("" if m["stderr"] is None else f" ± {m['stderr']:.4f}")
            guess = "" if m["chance"] is None else f"{m['chance']:.4f}"
            cells = (r["checkpoint"], r["system"], f"{r['step']:,}", r["task"], f"{r['n']:,} {r['unit']}", m["metric"], value)
            lines.append("| " + " | ".join((*cells, guess)) + " |")
    return "\n".join(lines)


def main(arguments):
    parser = parser_with(__doc__, ckpt="best.pt", device="auto")
    parser.add_argument("out_dirs", nargs="+", help="folders of checkpoints")
    parser.add_argument("--tasks", default="", help="names of the harness's tasks, with commas between them")
    parser.add_argument("--data", help="folder with local copies of the tasks' data sets: OWNER/NAME of the hub as DATA/NAME")
    parser.add_argument("--num_fewshot", type=int, default=0, help="examples before each question of a task")
    parser.add_argument("--limit", type=int, help="only this many items of each task; default: all")
    parser.add_argument("--text", nargs="+", default=[], help="files of text")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time; fewer take less memory")
    parser.add_argument("--out", default="results/evaluate.json", help="JSON that the results are added to")
    args = parser.parse_args(arguments)

    tasks = [name for name in args.tasks.split(",") if name]
    if args.num_fewshot < 0:
        raise UserError(f"--num_fewshot {args.num_fewshot} must be at least 0")
    if not tasks and not args.text:
        raise UserError("nothing to evaluate: give --tasks or --text")
    for key in ("limit", "batch_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)} must be at least 1")
    texts = {path: read_text(path) for path in args.text}
    # a stored result counts only for the same question, the same checkpoint file and the same text
    about_text = dict(limit=None, num_fewshot=0)
    questions = [dict(task=path, data=hashlib.sha256(t.encode()).hexdigest()) | about_text for path, t in texts.items()]

    device, asked = pick_device(args.device), []
    with Records(args.out) as records:
        for record in records.all:
            record.setdefault("num_fewshot", 0)  # an older version knew no other number
        asked_before = {r["task"] for r in records.all}  # these names exist: no need to look through all tasks, for ten seconds
        tasks = [task for name in tasks for task in ([name] if name in asked_before else tasks_of(name))]
        questions += [dict(task=name, data=args.data, limit=args.limit, num_fewshot=args.num_fewshot) for name in tasks]
        for out_dir in args.out_dirs:
            path = os.path.join(out_dir, args.ckpt)
            model, state = checkpoint.load_model(path, device)
            lm = Adapter(model, get_tokenizer(state["tokenizer"]), args.batch_size)
            about = dict(checkpoint=path, sha256=sha256(path), system=model.config.variant, step=state["step"])
            for question in questions:

                def answer(lm=lm, question=question):
                    start, task = time.time(), question["task"]
                    found = evaluate_text(lm, texts[task]) if task in texts else evaluate_task(lm, **question)
                    return found | checkpoint.made_with(device) | dict(lm_eval=lm_eval.__version__, seconds=time.time() - start)

                asked.append(records.find_or(about | question, answer))
    print(table(asked))


if __name__ == "__main__":
    cli(main)
