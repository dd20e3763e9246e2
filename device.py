"""The machine that a model runs on: its device, the precision that is fast there, and how much of it a run uses."""

import ctypes
import resource
import sys
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from guard import UserError

# bf16 matrix products without sparsity, FLOP/s, by a part of the card's name (the makers' data sheets)
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12}  # fmt: skip


def pick_device(name, say=lambda text: print(text, file=sys.stderr)):
    """
    The device of this name; auto means CUDA if there is a card, else the CPU. If a card is asked for and there is none, it
    takes the CPU and tells so by say(). Raises UserError for an unknown name, or a device that cannot be used here.
    """
    try:
        kind = torch.device("cpu" if name == "auto" else name).type
    except RuntimeError:
        raise UserError(f"device={name!r} is none of auto, cpu, cuda, cuda:1, mps") from None
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        say(f"device={name}, but torch {torch.__version__} sees no CUDA card: going on with the CPU")
        return "cpu"
    try:
        if kind not in ("cpu", "cuda", "mps"):
            raise RuntimeError("models run on cpu, cuda and mps")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"device={name} cannot be used here: {reason}; take --device=cpu or another one") from None
    return name


def short_dtype(kind):
    """The shortest dtype that makes matrix products faster on this kind of device (cuda, cpu, mps), or float32: its name."""
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    cpu = torch.cpu.get_capabilities() if kind == "cpu" else {}
    return "bfloat16" if cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16") else "float32"


def keep_memory():
    """
    Make glibc's malloc keep the memory that a step frees: the next step uses it again. By default it returns large blocks to
    the system, and a step on a CPU spends a fifth of its time on getting them back, page by page.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def memory_gb(kind):
    """The most memory that this process has held at once, in GB: of the card if the kind is cuda, otherwise of the host."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_flops(kind):
    """FLOP/s of the card's bfloat16 matrix products as its maker states them; None for a CPU or an unknown card."""
    if kind != "cuda":
        return None
    return next((flops for card, flops in PEAK_FLOPS.items() if card in torch.cuda.get_device_name()), None)


def flops_per_token(model):
    """
    Multiplications and additions of a training step of a GPT, forward and twice that backward, per token of a full context.
    All keys are counted, as in [PaLM, arXiv 2204.02311] and nanoGPT, also those that a causal query does not see.
    """

    def forward(T):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            idx = torch.zeros(1, T, dtype=torch.long)
            # the counter's hooks trip over views of parameters that want gradients
            type(model)(replace(model.config, block_size=T)).requires_grad_(False)(idx, idx)
        return counter.get_total_flops()

    # so short that attention is in one piece: then the count is a T + b T^2
    a_plus_128b, a_plus_256b = forward(128) / 128, forward(256) / 256
    return 3 * (a_plus_128b + (a_plus_256b - a_plus_128b) / 128 * (model.config.block_size - 128))
