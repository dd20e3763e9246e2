"""The arguments that several experiments have, each described once."""

import argparse

SHARED = dict(
    ckpt=dict(help="the checkpoint in the run's folder: best.pt has the least validation loss, ckpt.pt is the latest"),
    compile=dict(action="store_true", help="compile the variants"),
    data_dir=dict(help="folder of the data sets; default: as in training"),
    device=dict(help="cuda, cpu, mps; auto: cuda if there is a card, else cpu"),
    dtype=dict(choices=("bfloat16", "float16", "float32"), help="number format in matrix products"),
    nanogpt=dict(metavar="DIR", help="a clone of github.com/karpathy/nanoGPT"),
    seeds=dict(nargs="+", type=int, help="of the weights, the order of the data and dropout"),
    split=dict(choices=("train", "val"), help="the part of the text that is read"),
)


def parser_with(doc, **defaults):
    """An ArgumentParser: doc is its description, and it has the SHARED arguments that `defaults` names, with these values."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        result.add_argument(f"--{name}", default=default, **SHARED[name])
    return result
