"""
Checkpoints: a run's tensors and plain values, saved whole or not at all and loaded without running any code in them;
and surgery, which turns a trained MHA into another system without changing its function.
"""

import os
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
    """
    What save() wrote to path, or the model that nanoGPT saved there. Raises UserError if there is nothing, or nothing that
    is safe, to load.
    """
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one with python train.py --out_dir={os.path.dirname(path)}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can make the unpickler raise anything
        raise UserError(f"{path} is not a whole checkpoint of train.py ({type(error).__name__})") from None
    if "model_args" in state:  # nanoGPT's
        weights = {k.removeprefix("_orig_mod."): v for k, v in state["model"].items() if not k.endswith(".attn.bias")}
        state = dict(
            model=weights, model_config=asdict(GPTConfig(**state["model_args"])), tokenizer="gpt2", step=state["iter_num"]
        )
    return state


def load_model(path, device="cpu", **choices):
    """The checkpoint's model, ready to be evaluated, with these choices of its configuration changed, and the checkpoint."""
    state = load(path, device)
    try:
        # reversible matters to training only
        model = GPT(GPTConfig(**state["model_config"] | dict(reversible=False) | choices)).to(device).eval()
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit: {str(error).splitlines()[0]}") from None
    return model, state


SCALARS = ("beta", "gamma", "mu", "eta", "learned")


def surgery(config, donor, weights):
    """
    Another model's weights in config's model: (config, weights) with the donor's sizes but config's block_size, cropped.
    donor is the configuration of weights, a dict. If the two are one system (n_loop apart), that is all. If the donor is
    MHA, config's system starts with its function and learns to leave it: tau = 0; or beta = 0, learned, with eta = 1 and
    Nesterov's mu = eta beta, whatever config says of them. Raises UserError if that cannot be.
    """
    sizes = {size: donor[size] for size in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")}
    if config.block_size > donor["block_size"]:
        raise UserError(f"block_size={config.block_size}: the weights have {donor['block_size']} positions; take at most that")
    weights = {k: v[: config.block_size] if k.endswith(("wpe.weight", "vpe.weight")) else v for k, v in weights.items()}

    def differs(config, *free):
        """The donor's choices that config makes differently, but for the free ones."""
        free += ("variant", "block_size", "dropout", "reversible", *sizes)
        return [choice for choice, value in donor.items() if choice not in free and getattr(config, choice) != value]

    try:
        if not differs(config, "n_loop"):
            return replace(config, **sizes), weights
        if differs(GPTConfig()):
            raise UserError(
                f"a checkpoint of {donor['variant']} cannot become {config.variant} (they differ in "
                f"{', '.join(differs(config))}): only one of MHA can become another system"
            )
        if others := differs(config, "curvature", "momentum", "momentum_on", *SCALARS):
            raise UserError(f"{config.variant} cannot start as MHA: nothing undoes its {', '.join(others)}")
        if config.momentum == "none":
            return replace(config, **sizes), weights
        if config.momentum not in ("polyak", "nesterov"):
            raise UserError(f"momentum={config.momentum} cannot start as MHA: take polyak or nesterov")
        learned = {"beta", *config.learned.split()} - {"mu"}
        return replace(config, **sizes, beta=0.0, gamma=1.0, mu=None, eta=1.0, learned=" ".join(sorted(learned))), weights
    except ValueError as error:
        raise UserError(f"{config.variant} cannot take the weights of {donor['variant']}: {error}") from None


def gpt2(name):
    """
    GPT-2's released weights through transformers: (configuration as a dict, state_dict) in nanoGPT's names. name is gpt2,
    gpt2-medium, gpt2-large or gpt2-xl, or a folder that save_pretrained() wrote. As in nanoGPT the MLP's gelu is the exact
    one and not the tanh approximation that the weights were trained with, which moves the loss a little.
    """
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise UserError(f"init_from={name} loads released weights through transformers: pip install transformers") from None
    try:
        model = GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"init_from={name} is neither scratch, resume nor a checkpoint X.pt, and transformers cannot load it: "
            f"{str(error).splitlines()[0]}"
        ) from None
    c = model.config
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, vocab_size=c.vocab_size)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
    state = {k: v.t() if k.endswith(transposed) else v for k, v in model.state_dict().items()}
    return asdict(GPTConfig(**sizes)), state
