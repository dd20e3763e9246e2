"""
The variants as a Markdown table, at GPT-2's size: what each chooses, its parameters, and FLOPs of a training step per token.

    python -m experiments.variants
"""

import torch

from device import flops_per_token
from experiments.records import markdown
from model import GPT, VARIANTS, GPTConfig


def table():
    """A line for each of VARIANTS."""
    rows = []
    for name, row in VARIANTS.items():
        choices = " ".join(f"{k}={v!r}" if k == "learned" else f"{k}={v}" for k, v in row.items() if k != "source")
        with torch.device("meta"):
            model = GPT(GPTConfig(variant=name))
        counts = (f"{n:,}" for n in model.count_parameters().values())
        rows.append([f"`{name}`", row["source"], choices, *counts, f"{flops_per_token(model) / 1e6:,.0f}"])
    return markdown(["variant", "source", "choices", "embedding", "layers", "scalars", "MFLOPs per token"], rows, left=3)


if __name__ == "__main__":
    print(table(), end="")
