"""
Text from a checkpoint, on standard output, as it is generated.

    python sample.py --out_dir=out/demo --start="The module" --num_samples=2 --temperature=0.8
    python sample.py --init_from=gpt2 --start="The answer is"

--start=FILE:prompt.txt takes the prompt from a file; an empty prompt starts a new document. <|endoftext|> in a prompt ends a
document.
"""

import codecs
import contextlib
import math
import os
import sys
from dataclasses import dataclass

import torch

import checkpoint
from configurator import PathName, parse
from data import get_tokenizer
from device import pick_device
from guard import UserError, cli
from model import GPT, GPTConfig


@dataclass
class Config:
    out_dir: PathName = "out"  # folder of the checkpoint
    ckpt: str = "best.pt"  # the checkpoint's file: best.pt (least validation loss) or ckpt.pt (the latest)
    init_from: PathName = "resume"  # resume: the checkpoint; X.pt: another; gpt2, gpt2-xl, ... or a folder: released weights
    start: str = ""  # the prompt, or FILE:path of one
    num_samples: int = 1  # texts to generate
    max_new_tokens: int = 500  # longest continuation, in tokens
    temperature: float = 0.8  # below 1 more predictable, above 1 less; 0 always takes the likeliest token
    top_k: int | None = 200  # choose among this many likeliest tokens; None: all
    top_p: float = 1.0  # choose among the likeliest tokens whose probabilities reach this sum
    seed: int = 1337  # of the choices
    n_loop: int | None = None  # times that the stack of blocks is applied; None: as in training
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one

    def __post_init__(self):
        least = dict(num_samples=1, max_new_tokens=1)
        problems = [f"{k}={getattr(self, k)} must be at least {v}" for k, v in least.items() if getattr(self, k) < v]
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature != 0 and not 1e-3 <= self.temperature < math.inf:
            problems.append(f"temperature={self.temperature} must be 0 or at least 0.001, and finite")
        if problems:
            raise ValueError("\n".join(problems))


def load(cfg, device):
    """The model and its tokenizer. Raises UserError if they cannot be loaded."""
    choices = {} if cfg.n_loop is None else dict(n_loop=cfg.n_loop)
    if cfg.init_from == "resume" or cfg.init_from.endswith(".pt"):
        path = os.path.join(cfg.out_dir, cfg.ckpt) if cfg.init_from == "resume" else cfg.init_from
        model, state = checkpoint.load_model(path, device, **choices)
        return model, get_tokenizer(state["tokenizer"])
    config, weights, tokenizer = checkpoint.gpt2(cfg.init_from)
    with checkpoint.fitting(cfg.init_from):
        model = GPT(GPTConfig(**config | choices)).eval()
        model.load_state_dict(weights)
    return model.to(device), get_tokenizer(tokenizer)


def prompt(start):
    """The prompt's text. Raises UserError for a file that cannot be read."""
    if start.startswith("FILE:"):
        try:
            with open(os.path.expanduser(start.removeprefix("FILE:")), encoding="utf-8-sig") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt {start}: {error}") from None
    # bytes that are not UTF-8 are surrogates here; they become "?"
    return start.encode(errors="replace").decode()


class Writer:
    """The text of tokens as they come, in whole characters; it leaves out tokens that have no text."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def text(self, tokens, final=False):
        known = [t for t in tokens if t < self.tokenizer.n_vocab and t != self.tokenizer.eot_token]
        return self.decoder.decode(b"".join(map(self.tokenizer.decode_single_token_bytes, known)), final)


def main(arguments):
    cfg = parse(Config, arguments)
    model, tokenizer = load(cfg, pick_device(cfg.device))
    tokens = tokenizer.encode(prompt(cfg.start), allowed_special={"<|endoftext|>"}, disallowed_special=())
    if (largest := max(tokens, default=0)) >= model.config.vocab_size:
        raise UserError(f"the prompt has the token {largest}, the model knows {model.config.vocab_size}: take another prompt")
    idx = torch.tensor([tokens or [tokenizer.eot_token]], device=model.lm_head.weight.device)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can

    torch.manual_seed(cfg.seed)
    # all samples at once: on a CPU, eight together take as long as two or three in turn. The first is written as it comes
    writers, rows = [Writer(tokenizer) for _ in range(cfg.num_samples)], [list(tokens) for _ in range(cfg.num_samples)]
    print(writers[0].text(tokens), end="", flush=True)
    choices = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, stop=tokenizer.eot_token)
    new = model.stream(idx.repeat(cfg.num_samples, 1), cfg.max_new_tokens, **choices)
    with contextlib.suppress(KeyboardInterrupt):  # after Ctrl-C it prints the texts as far as they are
        for column in new:
            for row, token in zip(rows, column[:, 0].tolist(), strict=True):
                row.append(token)
            print(writers[0].text(rows[0][-1:]), end="", flush=True)
    print(writers[0].text([], final=True), end="")
    for writer, row in zip(writers[1:], rows[1:], strict=True):
        print("\n---------------\n" + writer.text(row, final=True), end="")
    print()


if __name__ == "__main__":
    cli(main)
