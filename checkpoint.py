"""
Checkpoints: a run's tensors and plain values, saved whole or not at all and loaded without running any code in them.
"""

import os
import pickle
import zipfile

import torch

from configurator import UserError
from data import replacing


def save(path, state):
    """Write state, a dict of tensors and plain values, so that path always holds a complete checkpoint."""
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --out_dir") from None


def load(path, device="cpu"):
    """What save() wrote to path. Raises UserError if there is nothing, or nothing that is safe, to load."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one with python train.py --out_dir={os.path.dirname(path)}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a whole checkpoint of train.py ({type(error).__name__})") from None


def gpt2(name):
    """
    GPT-2's released weights through transformers: (sizes, state_dict) in nanoGPT's names. name is gpt2, gpt2-medium,
    gpt2-large or gpt2-xl, or a folder that save_pretrained() wrote.
    """
    from transformers import GPT2LMHeadModel

    try:
        model = GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {str(error).splitlines()[0]}") from None
    c = model.config
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, vocab_size=c.vocab_size)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
    state = {k: v.t() if k.endswith(transposed) else v for k, v in model.state_dict().items()}
    return sizes | dict(bias=True), state
