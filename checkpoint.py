"""
Checkpoints: a run's tensors and plain values, saved whole or not at all and loaded without running any code in them;
and surgery, which turns a trained MHA into another system without changing its function.
"""

import os
import pickle
import zipfile
from dataclasses import asdict, replace

import torch

from configurator import UserError
from data import replacing
from model import GPT, GPTConfig


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


def load_model(path, device="cpu", **choices):
    """The checkpoint's model, ready to be evaluated, with these choices of its configuration changed, and the checkpoint."""
    state = load(path, device)
    try:
        model = GPT(GPTConfig(**state["model_config"] | choices)).to(device).eval()
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit: {str(error).splitlines()[0]}") from None
    return model, state


def surgery(config, donor, weights):
    """
    Another model's weights in config's model: (config, weights) with the donor's sizes but config's block_size, cropped.
    donor is the configuration of weights, a dict. If the two are one system, that is all. If the donor is MHA, config's
    system starts as MHA: tau = 0, and a beta of nearly nothing, learned from there on. Raises UserError if it can't.
    """
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "bias")
    if config.block_size > donor["block_size"]:
        raise UserError(f"block_size={config.block_size}: the weights have {donor['block_size']} positions; take at most that")
    config = replace(config, **{size: donor[size] for size in sizes})
    weights = {k: v[: config.block_size] if k.endswith(("wpe.weight", "vpe.weight")) else v for k, v in weights.items()}

    def differs(config, free=()):
        """The donor's choices that config makes differently, but for the free ones."""
        own = {"variant", "block_size", "dropout", "reversible", *free}
        return [choice for choice, value in donor.items() if choice not in own and getattr(config, choice) != value]

    if not differs(config):
        return config, weights
    if differs(GPTConfig(**{size: donor[size] for size in sizes})):
        raise UserError(
            f"a checkpoint of {donor['variant']} cannot become {config.variant} (they differ in {', '.join(differs(config))}): "
            "only one of MHA can become another system"
        )
    if others := differs(config, free=("curvature", "momentum", "momentum_on", "beta", "gamma", "mu", "eta", "learned")):
        raise UserError(f"{config.variant} cannot start as MHA: nothing undoes its {', '.join(others)}")
    if config.momentum not in ("none", "polyak", "nesterov"):
        raise UserError(f"momentum={config.momentum} cannot start as MHA: take polyak or nesterov")
    if config.momentum != "none":
        config = replace(config, beta=1e-6, gamma=1.0, mu=None, eta=1.0, learned="beta")
    return config, weights


def gpt2(name):
    """
    GPT-2's released weights through transformers: (configuration as a dict, state_dict) in nanoGPT's names. name is gpt2,
    gpt2-medium, gpt2-large or gpt2-xl, or a folder that save_pretrained() wrote.
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
    return asdict(GPTConfig(**sizes)), state
