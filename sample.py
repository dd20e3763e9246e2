"""
Text from a checkpoint, on standard output.

    python sample.py --out_dir=out/demo --start="The module" --num_samples=2 --temperature=0.8

--start=FILE:prompt.txt takes the prompt from a file; an empty one starts a new document.
"""

import os
from dataclasses import dataclass

import torch

import checkpoint
from configurator import parse
from data import get_tokenizer
from device import pick_device
from guard import UserError, cli


@dataclass
class Config:
    out_dir: str = "out"  # folder of the checkpoint
    ckpt: str = "best.pt"  # its file in there: best.pt, of least validation loss, or ckpt.pt, the latest
    start: str = ""  # the prompt, or FILE:path of one
    num_samples: int = 1  # texts to generate
    max_new_tokens: int = 500  # longest continuation, in tokens
    temperature: float = 0.8  # below 1 more predictable, above 1 less; 0 always takes the likeliest token
    top_k: int | None = 200  # choose among this many likeliest tokens; None: all
    seed: int = 1337  # of the choices
    n_loop: int | None = None  # times that the stack of blocks is applied; None: as in training
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one

    def __post_init__(self):
        least = dict(num_samples=1, max_new_tokens=1, temperature=0)
        problems = [f"{k}={getattr(self, k)} must be at least {v}" for k, v in least.items() if getattr(self, k) < v]
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if problems:
            raise ValueError("\n".join(problems))


def main(arguments):
    cfg = parse(Config, arguments)
    device = pick_device(cfg.device)
    choices = {} if cfg.n_loop is None else dict(n_loop=cfg.n_loop)
    model, state = checkpoint.load_model(os.path.join(cfg.out_dir, cfg.ckpt), device, **choices)
    tokenizer = get_tokenizer(state["tokenizer"])

    prompt = cfg.start
    if prompt.startswith("FILE:"):
        try:
            with open(prompt.removeprefix("FILE:"), encoding="utf-8") as file:
                prompt = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt {prompt}: {error}") from None
    # every tokenizer here writes any text as bytes at worst; surrogates are what the shell made of other input
    tokens = tokenizer.encode_ordinary(prompt.encode(errors="replace").decode())
    idx = torch.tensor([tokens or [tokenizer.eot_token]], device=device)

    torch.manual_seed(cfg.seed)
    # all samples at once: on a CPU, eight take about as long as three one after the other
    out = model.generate(idx.repeat(cfg.num_samples, 1), cfg.max_new_tokens, cfg.temperature, cfg.top_k, tokenizer.eot_token)
    texts = [[token for token in row if token < tokenizer.n_vocab and token != tokenizer.eot_token] for row in out.tolist()]
    print("\n---------------\n".join(map(tokenizer.decode, texts)))


if __name__ == "__main__":
    cli(main)
