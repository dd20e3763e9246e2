"""
Checkpoints: a run's tensors and plain values, saved whole or not at all and loaded without running any code in them;
and surgery, which gives a trained model momentum or curvature without changing its function.
"""

import contextlib
import math
import os
import platform
import re
import shutil
import subprocess
import textwrap
import zipfile
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch

from data import ORDER
from files import replacing
from guard import UserError
from log import say
from model import GPT, GPTConfig


@dataclass
class Progress:
    """What a run carries from step to step beside its weights and optimizers. A checkpoint holds it under these names."""

    step: int = 0  # steps taken
    seconds: float = 0.0  # spent on them
    best_loss: float = math.inf  # least validation loss
    running_mean: float = 0.0  # of the training loss
    high: int = 0  # steps in a row whose loss was over twice that

    @classmethod
    def of(cls, state):
        """The Progress in a checkpoint. Raises LookupError, TypeError or ValueError for what is no checkpoint of train.py."""
        return cls(**{field.name: type(field.default)(state[field.name]) for field in fields(cls)})


def save(folder, state, best, before=lambda: None):
    """
    Write state, a dict of tensors and plain values, to folder/ckpt.pt, which is a complete checkpoint at every moment. The
    one before stays as ckpt_prev.pt. If best, best.pt becomes the same file. before() is called when the new checkpoint is on
    the disk and not yet in its place. Raises UserError if the disk takes no more.
    """
    latest, previous, best_one = (os.path.join(folder, name) for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt"))

    def keep(new):  # now that it is whole and on the disk
        before()
        if best:
            duplicate(new, best_one)
        if os.path.exists(latest):
            duplicate(latest, previous)

    try:
        with replacing(latest, keep) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"  # torch hides what the disk said
        raise UserError(
            f"cannot write {latest}: {reason}; the checkpoints there are whole. Free some space or choose another --out_dir"
        ) from None


def duplicate(path, to):
    """Make `to` a second name of the file at path, or a copy where there are no hard links. An old `to` is replaced."""
    temporary = f"{to}.link"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.link(path, temporary)
        os.replace(temporary, to)
    except OSError:
        with open(path, "rb") as source, replacing(to) as file:
            shutil.copyfileobj(source, file)


def made_with(device):
    """What a run depends on, a dict of texts: python, torch, numpy, hardware, and the project's commit, empty outside git."""
    hardware = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            hardware = next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), hardware)
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    software = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)
    return software | dict(hardware=hardware, commit=commit)


def load(path):
    """
    What save() wrote to path, or the model that nanoGPT saved there, on the CPU. Raises UserError if there is nothing, or
    nothing that is whole and safe, to load.
    """
    path, previous = str(path), str(path).replace("ckpt.pt", "ckpt_prev.pt")
    offer = f"; the one before is kept: mv {previous} {path}" if previous != path and os.path.exists(previous) else ""
    if not os.path.exists(path):
        beside = os.path.join(os.path.dirname(path), "ckpt.pt")
        if os.path.exists(beside):
            offer = offer or f", only {beside}: take that one (sample.py: --ckpt=ckpt.pt)"
        train = f"train one with python train.py --out_dir={os.path.dirname(path)}"
        raise UserError(f"no checkpoint at {path}{offer or f': {train}'}")
    try:
        with zipfile.ZipFile(path) as file:  # torch doesn't check what it reads, and a changed bit is a changed weight
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "model_args" in state:
            state = of_nanogpt(path, state)
        state["model"].keys(), state["model_config"].keys(), state["tokenizer"].encode()
    except (MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except Exception as error:  # bytes that are no checkpoint can make the unpickler raise anything
        raise UserError(f"{path} is not a whole checkpoint of train.py ({type(error).__name__}){offer}") from None
    with fitting(path):
        return state | dict(model_config=renewed(path, state["model_config"], state["model"]))


def renewed(path, config, weights):
    """
    The model_config of these weights, perhaps from an earlier version, as this version writes it. Raises UserError for a
    system that this version does not compute.
    """
    learned = config.get("learned", "").split()
    gone = dict(verlet="kicked and drifted in another order", imex="had its friction implicit and not its force")
    if why := gone.get(config.get("momentum")):
        raise UserError(f"{path} is of an earlier version, whose {config['variant']} {why}: train it again")
    if "tau" not in config and config.get("energy") in ("linear", "gated_linear"):
        raise UserError(f"{path} is of an earlier version, whose linear attention ended in a norm of its own: train it again")
    if config.get("inner_steps", 1) > 1 and "transformer.h.0.mlp.eta.raw" not in weights:
        raise UserError(f"{path} is of an earlier version, whose tied MLP took a single inner step: train it again")
    if config.get("momentum") == "triple":  # nesterov that always learned eta
        config = config | dict(momentum="nesterov", learned=" ".join(dict.fromkeys([*learned, "eta"])))
    elif "tau" not in config and config.get("curvature", "none") != "none":  # its tau was always learned
        config = config | dict(learned=" ".join([*learned, "tau"]))
    elif config.get("tau") == 0 and "tau" not in learned:  # a curvature that did nothing
        config = config | dict(curvature="none", tau=1.0)
    before = dict(backbone="gpt2", implicit_steps=1, tau=1.0, temperature=1.0)  # what there was before these were choices
    return before | config


# a loss that numpy computed is kept as one of these, and making one runs no code of the file's
NUMPY_SCALARS = [np.float64().__reduce__()[0], np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]
GPT2_VOCABULARY = (50257, 50304)  # its tokens, and with nanoGPT's padding rows


def of_nanogpt(path, state):
    """
    A checkpoint of nanoGPT, or of a descendant that keeps its layout, in our layout: without the prefixes of compiled and
    distributed modules, the masks of old versions, and arguments that nanoGPT does not have. Raises UserError if its tokens
    are not GPT-2's: a character-level model's are in a pickle beside its data, and pickles are not loaded here.
    """
    args, sizes = state["model_args"], ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    if args["vocab_size"] not in GPT2_VOCABULARY:
        raise UserError(
            f"{path} is nanoGPT's, with {args['vocab_size']} tokens that are not GPT-2's: a character-level model cannot be "
            "read, since its characters are in a pickle, which could run any code; train again on text from prepare.py"
        )
    prefixes = re.compile(r"^((_orig_mod|module)\.)+")
    weights = {prefixes.sub("", k): v for k, v in state["model"].items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    config = asdict(GPTConfig(**{k: args[k] for k in sizes if k in args}))
    return dict(model=weights, model_config=config, tokenizer="gpt2", step=int(state["iter_num"]))


@contextlib.contextmanager
def fitting(path):
    """Turn what torch and dataclasses raise in this block into a UserError that names the checkpoint's path."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit: {textwrap.shorten(f'{type(error).__name__}: {error}', 300)}") from None


def differences(state, cfg, data):
    """
    How cfg and data (a fingerprint) differ from the checkpoint `state` in what would make another run: a list of texts, empty
    if the run can be resumed. Raises LookupError or TypeError for what is no checkpoint of train.py.
    """
    then, now = state["config"], asdict(cfg)
    there = dict(data=state["data"]) | {k: then[k] for k in ("optimizer", "seed")} | state["model_config"]
    here = now | dict(data=data)
    for k in ("gradient_accumulation_steps", "eval_iters"):  # what a step, and an evaluation, are made of
        there[f"batch_size * {k}"], here[f"batch_size * {k}"] = (c["batch_size"] * c[k] for c in (then, now))
    # surgery may have made another model than the configuration says: either is right
    return [f"{k}={v}, not {here[k]}" for k, v in there.items() if here[k] not in (v, then.get(k, v))]


def resumed(path, cfg, data, made_with):
    """
    The checkpoint at path, its GPTConfig and its Progress. made_with: what made_with() says now. Raises UserError if the
    checkpoint is not of the run that cfg and data (a fingerprint) describe, or is beyond that run's end.
    """
    state = load(path)
    if "config" not in state:
        raise UserError(f"{path} is nanoGPT's, and cannot be resumed: begin a run with its weights, by --init_from={path}")
    with fitting(path):
        differs, run, config = differences(state, cfg, data), Progress.of(state), GPTConfig(**state["model_config"])
        changed = [f"{k} {v}, now {made_with[k]}" for k, v in state["made_with"].items() if v != made_with[k]]
        other = "which read the text in another order" if state.get("order", 1) != ORDER else ""
        if state["config"]["optimizer"] == "muon" and "stacked" not in state["optimizers"][-1]["param_groups"][0]:
            other = "whose Muon took q, k and v for one matrix"
    if other:
        raise UserError(
            f"{path} is of another version of train.py, {other}, and cannot be resumed: begin a new run with its weights, by "
            f"--init_from={path} and another --out_dir"
        )
    if differs:
        raise UserError(f"{path} has {'; '.join(differs)}: resume with the run's own configuration and data")
    if not 0 <= run.step <= cfg.max_iters:
        raise UserError(f"{path} is of step {run.step}, max_iters={cfg.max_iters} ends before: raise max_iters")
    say(f"resuming at step {run.step}" + (f"; begun with {'; '.join(changed)}" if changed else ""))
    return state, config, run


def restore(optimizer, saved):
    """
    Load the state `saved` into an optimizer, whose rates and decays stay as they are. Raises ValueError if the state is not of
    this optimizer's parameters: torch would load it, and at the next step read beyond the end of its tensors.
    """
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved["state"]))
    kept = optimizer.state.items()
    shapes = all(t.shape == (() if name == "step" else p.shape) for p, state in kept for name, t in state.items())
    n = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(kept) not in (0, n) or len({frozenset(state) for _, state in kept}) > 1 or not shapes:
        raise ValueError("the optimizer's state is not of the model's parameters")


def load_model(path, device="cpu", **choices):
    """(model, checkpoint): the checkpoint's model, ready for evaluation, with these choices of its configuration changed."""
    state = load(path)
    with fitting(path):
        # reversible matters to training only
        model = GPT(GPTConfig(**state["model_config"] | dict(reversible=False) | choices)).eval()
        model.load_state_dict(state["model"])
    return model.to(device), state


SCALARS = ("beta", "gamma", "mu", "eta", "tau", "learned")
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "bias")  # which surgery takes from the weights


def surgery(config, donor, weights):
    """
    Another model's weights in config's model: (config, weights) with the donor's sizes and config's block_size, to which it
    crops position tables. donor, a dict, is the configuration of weights. If both are one system (n_loop may differ), that is
    all. If the donor has neither momentum nor curvature, as MHA and Llama, config's system starts as the same function: with a
    curvature at tau = 0, with momentum at beta = 0, gamma = eta = 1 and Nesterov's mu = eta beta, whatever config says. tau and
    beta are then learned. Raises UserError if that cannot be.
    """
    sizes = {size: donor[size] for size in SIZES}
    if config.block_size > donor["block_size"]:
        raise UserError(f"block_size={config.block_size}: the weights have {donor['block_size']} positions; take at most that")
    weights = {k: v[: config.block_size] if k.endswith(("wpe.weight", "vpe.weight")) else v for k, v in weights.items()}

    def differs(*free):
        """The donor's choices that config makes differently, except the free ones."""
        free += ("variant", "block_size", "dropout", "reversible", *sizes)
        return [choice for choice, value in donor.items() if choice not in free and getattr(config, choice) != value]

    try:
        both = {*config.learned.split()} & {*donor.get("learned", "").split()}  # the weights hold these numbers
        if not differs("n_loop", *both):
            return replace(config, **sizes, **{name: donor[name] for name in both}), weights
        if (donor["momentum"], donor["curvature"], donor["velocity_init"]) != ("none", "none", "zero"):
            raise UserError(
                f"a checkpoint of {donor['variant']} cannot become {config.variant} (they differ in {', '.join(differs())}): "
                "only one without momentum, curvature and extra tables, such as MHA's, can become another system"
            )
        learned = {*config.learned.split(), *donor.get("learned", "").split()}
        starts = dict(temperature=donor["temperature"]) if "temperature" in learned else {}
        if others := differs("curvature", "momentum", "momentum_on", *SCALARS, *starts):
            raise UserError(
                f"{config.variant} cannot start as {donor['variant']}: surgery cannot change its {', '.join(others)}; "
                f"take {' '.join(f'--{choice}={donor[choice]}' for choice in others)}"
            )
        if config.curvature != "none":
            learned, starts = learned | {"tau"}, starts | dict(tau=0.0)
        if config.momentum not in ("none", "polyak", "nesterov"):
            raise UserError(f"momentum={config.momentum} cannot start as {donor['variant']}: take polyak or nesterov")
        if config.momentum != "none":
            learned, starts = (learned | {"beta"}) - {"mu"}, starts | dict(beta=0.0, gamma=1.0, mu=None, eta=1.0)
        started = replace(config, **sizes, **starts, learned=" ".join(sorted(learned)))
        if started.mu is not None:
            raise UserError(f"{config.variant} looks ahead by mu={started.mu}, also at beta=0: take --variant=NagMHA")
        return started, weights
    except ValueError as error:
        raise UserError(f"{config.variant} cannot take the weights of {donor['variant']}: {error}") from None


def donated(cfg, config, tokenizer):
    """
    The weights of cfg.init_from, X.pt or a name of gpt2(), in config's model: surgery()'s (config, weights). tokenizer: that of
    the text. Raises UserError if the weights have another tokenizer, or cannot become config's model.
    """
    if cfg.init_from.endswith(".pt"):
        state = load(cfg.init_from)
        donor, weights, theirs = state["model_config"], state["model"], state["tokenizer"]
    else:
        donor, weights, theirs = gpt2(cfg.init_from)
    if theirs != tokenizer and not cfg.any_tokenizer:
        raise UserError(
            f"{cfg.init_from} has the tokenizer {theirs}, the text has {tokenizer}: prepare the text with --tokenizer "
            f"{theirs}, or teach the model other tokens with --any_tokenizer"
        )
    sizes = [
        f"{size}={getattr(cfg, size)}, not {donor[size]}"
        for size in SIZES
        if size in getattr(cfg, "given", ()) and getattr(cfg, size) != donor[size]
    ]
    if sizes:
        raise UserError(f"{cfg.init_from} has its own sizes, and the command line has {'; '.join(sizes)}: leave them out")
    return surgery(config, donor, weights)


def gpt2(name):
    """
    GPT-2's released weights through transformers: (configuration as a dict, state_dict in nanoGPT's names, tokenizer). name is
    gpt2, gpt2-medium, gpt2-large or gpt2-xl, or a folder that save_pretrained() wrote. As in nanoGPT the MLP's gelu is the
    exact one and not the tanh approximation that the weights were trained with, which moves the loss a little.
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
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    c = model.config
    wants = dict(activation_function=("gelu_new", "gelu", "gelu_pytorch_tanh"), n_inner=(None, 4 * c.n_embd),
                 scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), layer_norm_epsilon=(1e-5,),
                 tie_word_embeddings=(True,), add_cross_attention=(False,))  # fmt: skip
    if odd := [f"{k}={getattr(c, k)}, not {v[0]}" for k, v in wants.items() if getattr(c, k) not in v]:
        raise UserError(f"init_from={name}: its config.json has {'; '.join(odd)}, which this GPT-2 does not compute")
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, vocab_size=c.vocab_size)
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out)
    state = {k: v.t() if k.endswith(transposed) else v for k, v in model.state_dict().items()}
    tokenizer = getattr(c, "tiktoken_name", "gpt2" if c.vocab_size in GPT2_VOCABULARY else "unknown")  # export.py writes it
    return asdict(GPTConfig(**sizes)), state, tokenizer
