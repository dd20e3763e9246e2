"""
nanoDescent: a GPT in which every attention and every layer is a step of an optimizer.

The residual stream x is the iterate. A sublayer is an oracle: given x it returns a descent direction g. An update rule moves
the iterate, and may carry a velocity v from layer to layer. All variants share one block:

    x, v = rule(x, v, attention);   x, v = rule(x, v, mlp)

A variant is one choice on each axis (energy, momentum, ...): no class and no loop tests its name. The file, in order:

    VARIANTS, GPTConfig     the systems of the papers, and the choices that they are made of
    ..._attention           energies and curvatures as equations:  q, k, v -> o
    ENERGIES, BACKBONES     oracles:  x -> g.                      A new energy is a class and a line in ENERGIES.
    RULES                   update rules:  x, v, oracles -> x, v.  A new rule is a class and a line in RULES.
    Block, GPT              the model
    only for speed          skip it on a first reading
    what is refused         choices that make no sense together

MHA is nanoGPT's model with nanoGPT's parameter names. In shapes B counts sequences, T tokens; C = n_embd, nh = n_head,
hs = C / nh. "Derived" marks a form that we derived: no paper states it. The sources, by arXiv id:

    [Ren]    2511.00907   Transformers as Intrinsic Optimizers: Forward Inference through the Energy Principle
    [Zimin]  2601.23236   YuriiFormer: A Suite of Nesterov-Accelerated Transformers
    [Xu]     2605.07588   Revisiting Transformer Layer Parameterization Through Causal Energy Minimization
    [Gai]    2605.24425   Momentum Streams for Optimizer-Inspired Transformers
"""

from __future__ import annotations  # GPTConfig names tables that stand further below

import difflib
import functools
import itertools
import math
import typing
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# ---- the choices -----------------------------------------------------------------------------------------------------

# What the systems of [Zimin] and [Gai] share that have a velocity.
FORMER = dict(momentum_on="both", velocity_init="embed", velocity_norm=True, learned="beta gamma", beta=0.9)
YURII = FORMER | dict(momentum="nesterov", learned="beta gamma mu", mu=0.9)
# A system's name: its source, and the choices in which it differs from MHA.
VARIANTS = {
    "MHA": dict(source="nanoGPT"),
    "Llama": dict(source="[Xu]'s baseline", backbone="llama"),
    "MHAEuler": dict(source="[Zimin]", splitting="euler"),
    "MomenMHA": dict(source="[Ren]", momentum="polyak"),
    "NagMHA": dict(source="[Ren]", momentum="nesterov", beta=0.9),
    "MHA2nd1st": dict(source="name from [Ren], form derived", curvature="newton", learned="tau"),
    "LightMHA2nd1st": dict(source="name from [Ren], form derived", curvature="light", learned="tau"),
    "LinearMHA": dict(source="[Ren]", energy="linear"),
    "GatedLinearMHA": dict(source="[Ren]", energy="gated_linear"),
    "HuberMHA": dict(source="[Ren]'s question, form derived", energy="huber"),
    "DenseMHA": dict(source="control for MomenMHA", momentum="dense"),
    "YuriiFormer": dict(source="[Zimin]") | YURII,
    "YuriiFormerEuler": dict(source="[Zimin]") | YURII | dict(splitting="euler"),
    "PolyakFormer": dict(source="[Zimin]") | FORMER | dict(momentum="polyak"),
    "VerletFormer": dict(source="name from [Zimin], form derived") | FORMER | dict(momentum="polyak", splitting="strang"),
    "IMEXFormer": dict(source="name from [Zimin], form derived") | YURII | dict(implicit_steps=2),
    "TMMFormer": dict(source="[Gai]") | YURII | dict(learned="beta gamma mu eta"),
    "AdamFormer": dict(source="[Gai]") | FORMER | dict(momentum="adam"),
    "EmbedControl": dict(source="ours, [Gai] calls for it", velocity_init="embed"),
    "CEM": dict(source="[Xu]", backbone="llama", tied=True),
    "CEM+": dict(source="[Xu]", backbone="llama", tied=True, diagonal=True, precond_rank=8, inner_steps=2),
    "LoopNagMHA": dict(source="[Ren]'s question", momentum="nesterov", beta=0.5, n_loop=4),
}
# MHA's numbers. In every other choice MHA takes the first value that is listed.
NUMBERS = dict(beta=0.5, gamma=1.0, mu=None, eta=1.0, tau=1.0, temperature=1.0, learned="", delta=1.0, precond_rank=0,
               inner_steps=1, implicit_steps=1, n_loop=1)  # fmt: skip


@dataclass
class GPTConfig:
    """nanoGPT's sizes, a variant and overrides. None means: as the variant says. One ValueError lists all problems."""

    variant: str = "MHA"  # a paper's name for a set of choices: a row of VARIANTS in model.py
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width of the residual stream
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the token table
    dropout: float = 0.0  # share of activations dropped in training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; llama: none but gated_linear's
    backbone: Literal[*BACKBONES] | None = None  # what oracles are made of; llama: RMSNorm, rotary positions, SwiGLU
    energy: Literal[*ENERGIES] | None = None  # what attention descends
    curvature: Literal["none", *CURVATURES] | None = None  # how the energy's gradient is preconditioned
    momentum: Literal[*RULES] | None = None  # how the iterate moves
    momentum_on: Literal[*MOVED] | None = None  # the oracles that the momentum applies to
    splitting: Literal[*SPLITTINGS] | None = None  # lie_trotter: attention, MLP; euler: both at once; strang: half, MLP, half
    velocity_init: Literal["zero", "embed"] | None = None  # the velocity before the first layer; embed: tables of its own
    velocity_norm: bool | None = None  # a LayerNorm on the velocity, at every step; adam: on its direction
    tied: bool | None = None  # values are the keys, output projections are transposed input projections
    diagonal: bool | None = None  # tied: every head's W_Q^T W_K gets a diagonal term
    qk_norm: bool | None = None  # scale every query and every key to norm sqrt(hs)
    reversible: bool | None = None  # rebuild activations in the backward pass instead of storing them
    beta: float | None = None  # share of the velocity kept from one step to the next, in [0, 1)
    gamma: float | None = None  # weight of the oracle in the velocity, positive; adam: length of the step
    mu: float | None = None  # nesterov: how far to look ahead along the velocity; None: the variant's mu, otherwise eta beta
    eta: float | None = None  # length of the step along the velocity, positive
    tau: float | None = None  # newton, light: how much of the correction is added; 1: the whole step, 0: none
    temperature: float | None = None  # softmax: of attention's free energy, in units of sqrt(hs), positive; high: even weights
    learned: str | None = None  # which of these six are learned, in place of the variant's; tau and temperature: one per head
    delta: float | None = None  # huber: distance, in units of sqrt(hs), beyond which a key's pull is constant
    precond_rank: int | None = None  # tied: rank of the learned preconditioner; 0: none
    inner_steps: int | None = None  # tied: steps that each sublayer takes, on the same keys and gate
    implicit_steps: int | None = None  # nesterov: fixed-point iterations towards the implicit step; 1: the look-ahead alone
    n_loop: int | None = None  # times that the stack of blocks is applied

    def __post_init__(self):
        for name, value in resolved(self).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.bias &= self.backbone != "llama"
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self):
        """A message for each illegal setting of this configuration: the value, the rule and the remedy."""
        return refused(self)


# ---- energies and curvatures: q, k, v -> o, each (B, nh, T, hs) ------------------------------------------------------
# A position sees itself and those before it. A lone query is the last position, as in generation, and sees every key.
# "Values free" means that v_j may differ from k_j; the step is a gradient step only where v_j = k_j.


def softmax_attention(q, k, v, dropout=0.0, scale=None):
    """
    A gradient step on the free energy F(q) = -sqrt(hs) log sum_j exp(q.k_j / sqrt(hs)), values free [Ren]:

        o = sum_j p_j v_j        p_j = softmax_j(q.k_j / sqrt(hs))        (v = k gives k̄ = -grad F)

    scale: 1 / sqrt(hs), to be given if q is not hs wide.
    """
    return sdpa(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1, scale=scale)


def newton_attention(q, k, v, tau, dropout=0.0):
    """
    MHA2nd1st [Ren; form derived]: a Newton step on the free energy of E_j = |q - k_j|^2 / 2. Its inverse Hessian
    (I - Cov_p(k) / sqrt(hs))^-1 is replaced by the Taylor polynomial I + Cov_p(k) / sqrt(hs). This reweights attention:

        u = k̄ - q        s_j = (k_j - k̄).u / sqrt(hs)        w_j = p_j (1 + tau s_j)        o = sum_j w_j v_j

    tau: a number or (nh, 1, 1). tau = 0: softmax attention. tau = 1, if v = k and all keys have one norm: q plus this step.
    """

    def reweighted(q, k):
        p = weights(q, k)
        kbar = p @ k
        tau_u = (kbar - q) * tau / math.sqrt(q.size(3))  # tau and sqrt(hs) multiply here, where the tensor is smallest
        return p * (tau_u @ k.mT + (1 - (tau_u * kbar).sum(-1, keepdim=True)))

    return in_chunks(reweighted, q, k, v, dropout)


def light_attention(q, k, v, tau, dropout=0.0):
    """
    LightMHA2nd1st [Ren names it; form derived]. To first order 1 + tau s_j is exp(tau s_j), and p_j times this exponential
    gives, normalised, attention A at a moved query:        k̄ = A(q, K, K)        o = A(q + tau (k̄ - q), K, V)
    """
    kbar = softmax_attention(q, k, k)
    return softmax_attention(q + tau * (kbar - q), k, v, dropout)


def huber_attention(q, k, v, delta, dropout=0.0):
    """
    HuberMHA [Ren's open question; derived]: a gradient step on the free energy of E_j = H(|q - k_j|), where H(r) is
    r^2 / 2 up to r = delta and delta (r - delta / 2) beyond: no key pulls the query by more than delta. Values free, and the
    part with q left out:

        o = sum_j p_j min(1, delta / r_j) v_j        p_j = softmax_j(-E_j / sqrt(hs))        r_j = |q - k_j|
    """

    def pull(q, k):
        full = torch.promote_types(q.dtype, torch.float32)  # for a difference of large numbers
        qq, kk = (t.to(full).square().sum(-1) for t in (q, k))
        squares = qq[..., :, None] + kk[..., None, :] - 2 * (q @ k.mT)
        r = squares.clamp(min=1e-6).sqrt()  # away from 0, where the root has no gradient
        E = torch.where(r <= delta, r.square() / 2, delta * (r - delta / 2))
        p = (-E / math.sqrt(q.size(3))).masked_fill(~causal(E), -math.inf).softmax(-1)
        return p * (delta / r).clamp(max=1)

    return in_chunks(pull, q, k, v, dropout)


def linear_attention(q, k, v, log_a, S=None, chunk=64):
    """
    A gradient step on sum_j a_{j+1} ... a_i E_j with E_j = -(q.k_j)^2 / 2, values free [Ren]; LinearMHA has a = 1:

        S_i = a_i S_{i-1} + k_i v_i^T        o_i = S_i^T q_i = sum_{j<=i} a_{j+1} ... a_i (q_i.k_j) v_j

    It takes matrix products within a chunk of tokens, and hands S on from chunk to chunk: O(T hs (hs + chunk)) in time.
    log_a: (B, nh, T), float32, <= 0. S: (B, nh, hs, hs), float32, after the tokens before q, or None. Returns o and the last S.
    """
    if torch.float16 in (q.dtype, v.dtype):  # cannot hold a sum over many keys; on CUDA qk_norm makes q and k float32
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention(q.float(), k.float(), v.float(), log_a, S, chunk)
    T, chunk = q.size(2), min(chunk, q.size(2))
    q, k, v = (F.pad(t, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for t in (q, k, v))  # (B, nh, chunks, chunk, hs)
    b = F.pad(log_a, (0, -T % chunk)).unflatten(2, (-1, chunk)).cumsum(-1)  # log decay since the chunk began
    KV = (k * (b[..., -1:] - b).exp()[..., None]).mT @ v  # what each chunk adds to S: (B, nh, chunks, hs, hs)
    states = [torch.zeros_like(KV[:, :, 0]) if S is None else S]  # after 0, 1, 2, ... chunks
    for a, kv in zip(b[..., -1:, None].exp().unbind(2), KV.unbind(2), strict=True):
        states.append(a * states[-1] + kv)
    between = b[..., :, None] - b[..., None, :]  # log decay from token j to token i of a chunk, where j <= i
    decay = between.masked_fill(~causal(between), -math.inf).exp()
    o = (q @ k.mT * decay) @ v + (q * b.exp()[..., None]) @ torch.stack(states[:-1], 2)
    return o.flatten(2, 3)[:, :, :T], states[-1]


def rotate(t, past=0, back=False):
    """
    Rotary positions: turns entries m and m + hs / 2 of token i of t, (B, nh, T, hs), as a pair by the angle
    (past + i) 10000^(-2m / hs). So positions enter q.k only as a distance. back: turns back. Computes in float32 or float64.
    """
    (T, hs), full = t.shape[2:], dict(device=t.device, dtype=torch.promote_types(t.dtype, torch.float32))
    angle = torch.outer(torch.arange(past, past + T, **full), 10_000.0 ** (-torch.arange(0, hs, 2, **full) / hs))
    cos, sin = angle.cos(), -angle.sin() if back else angle.sin()
    a, b = t.to(full["dtype"]).chunk(2, 3)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), 3).to(t.dtype)


def causal(E):
    """Which keys each query sees, where E is (..., queries, keys): (queries, keys), bool."""
    n, m = E.shape[-2:]
    return torch.ones(n, m, dtype=torch.bool, device=E.device).tril(m - n)


# ---- oracles: x -> descent direction g, both (B, T, C) ---------------------------------------------------------------


class Scalar(nn.Module):
    """A number or a tensor of them within a range. If learned, a map takes a parameter into the range; otherwise fixed."""

    MAPS = dict(  # range: (map, its inverse)
        real=(lambda a: a, lambda y: y),
        unit=(torch.sigmoid, torch.logit),  # (0, 1)
        positive=(F.softplus, lambda y: y + torch.log(-torch.expm1(-y))),  # (0, inf)
    )

    def __init__(self, value, range="real", learned=True):
        super().__init__()
        self.value, (self.map, inverse) = value, self.MAPS[range]
        self.raw = nn.Parameter(inverse(torch.as_tensor(value, dtype=torch.float32))) if learned else None

    def forward(self, x=None):
        """The value. Given x, (B, T, C), it repeats a learned number per token, (B, T, 1): that gradient compiles better."""
        value = self.value if self.raw is None else self.map(self.raw)
        return value if x is None or self.raw is None else value.expand(*x.shape[:2], 1)


class Stacked(nn.Linear):
    """n linear maps of one x, their matrices stacked in one: (B, T, C) -> n times (B, T, width)."""

    def __init__(self, n, C, width, bias):
        super().__init__(C, n * width, bias)
        self.n = n

    def forward(self, x):
        return super().forward(x).chunk(self.n, 2)

    def map(self, i, x):
        """The i-th of them alone."""
        return F.linear(x, self.weight.chunk(self.n)[i], None if self.bias is None else self.bias.chunk(self.n)[i])


class Attention(nn.Module):
    """Multi-head attention. A subclass is an energy: its attend(q, k, v, dropout), or all of forward(), is a step on it."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config, self.sqrt_hs = config, math.sqrt(C / config.n_head)
        self.c_attn = Stacked(3, C, C, config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        q, k, v = self.qkv(x, 0 if cache is None else cache.n)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.out(self.attend(q, k, v, self.config.dropout if self.training else 0.0))

    def qkv(self, x, past=0):
        """Queries, keys and values, (B, nh, T, hs) each, of tokens that come after `past` others."""
        q, k, v = (t.unflatten(2, (self.config.n_head, -1)).transpose(1, 2) for t in self.c_attn(x))
        if self.config.qk_norm:
            q, k = F.rms_norm(q, q.shape[3:]), F.rms_norm(k, k.shape[3:])
        if self.config.backbone == "llama":
            q, k = rotate(q, past), rotate(k, past)
        return q, k, v

    def out(self, o):
        """The heads' outputs side by side, projected: (B, nh, T, hs) -> (B, T, C)."""
        return self.resid_dropout(self.c_proj(o.transpose(1, 2).flatten(2)))


class SoftmaxAttention(Attention):
    """E_j = -q.k_j: a gradient step or, with a curvature, an approximate Newton step."""

    def __init__(self, config):
        super().__init__(config)

        def of_heads(name, range):
            value, learned = getattr(config, name), name in config.learned.split()
            return Scalar(torch.full((config.n_head, 1, 1), value) if learned else value, range, learned)

        self.tau, self.temperature = of_heads("tau", "real"), of_heads("temperature", "positive")

    def qkv(self, x, past=0):
        """q and k over the root of the temperature: so the equations may go on with sqrt(hs) as theirs."""
        q, k, v = super().qkv(x, past)
        if self.temperature.raw is None and self.temperature.value == 1:
            return q, k, v
        shrink = self.temperature() ** -0.5
        return (q * shrink).to(q.dtype), (k * shrink).to(k.dtype), v

    def attend(self, q, k, v, dropout):
        if self.config.curvature == "none":
            return softmax_attention(q, k, v, dropout)
        return CURVATURES[self.config.curvature](q, k, v, self.tau(), dropout)


class HuberAttention(Attention):
    """E_j = H(|q - k_j|), with delta in units of sqrt(hs)."""

    def attend(self, q, k, v, dropout):
        return huber_attention(q, k, v, self.config.delta * self.sqrt_hs, dropout)


class LinearAttention(Attention):
    """
    E_j = -(q.k_j)^2 / 2, in a plain sum, not a free energy. It remembers the past as a state S, not as keys. Its step is

        o_i / sqrt(N_i)        N_i = a_i N_{i-1} + 1        (N: the number of tokens so far, where a = 1)

    A sum of N independent terms is about sqrt(N) times as large as one [derived]. A norm layer on o_i instead would magnify
    rounding at the first positions: there o_i is a single product, and a norm layer keeps little but its sign.
    """

    def forward(self, x, cache=None):
        cache = cache or Cache(0)
        log_a, (S, M) = self.log_a(x), cache.S or (None, None)  # the states of o and N
        one = torch.ones_like(log_a)[..., None]
        o, S = linear_attention(*self.qkv(x, cache.n), log_a, S)
        N, M = linear_attention(one, one, one, log_a, M)
        cache.n, cache.S = cache.n + x.size(1), (S, M)
        return self.out(o / N.sqrt())

    def log_a(self, x):
        """log a: (B, nh, T), <= 0 by construction and in float32, where a sum over many tokens stays exact."""
        return x.new_zeros(x.size(0), self.config.n_head, x.size(1), dtype=torch.promote_types(x.dtype, torch.float32))


class GatedLinearAttention(LinearAttention):
    """The same with learned forgetting: a = sigmoid of a linear map of x, one for each head."""

    def __init__(self, config):
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, config.n_head)  # its bias, always there, says how long a head remembers

    def log_a(self, x):
        gate = self.c_gate(x).mT.to(torch.promote_types(x.dtype, torch.float32))
        # spreads the heads' memories: at first a past is half forgotten after 1 token (first head) to 280 (last)
        return F.logsigmoid(gate + torch.linspace(0, 6, gate.size(1), device=x.device)[:, None])


ENERGIES = dict(softmax=SoftmaxAttention, linear=LinearAttention, gated_linear=GatedLinearAttention, huber=HuberAttention)
CURVATURES = dict(newton=newton_attention, light=light_attention)


class Tied(nn.Module):
    """
    A sublayer of CEM [Xu], minus the gradient in x of an energy: so its matrices serve on the way in and on the way out.
    With inner_steps > 1 it descends again from the moved x, on the same keys and gate:

        g = sum_s eta_s P g_s        g_s: minus the gradient at x + the steps so far        P: the preconditioner
    """

    def __init__(self, config):
        super().__init__()
        self.config, n = config, config.inner_steps
        self.eta = Scalar(torch.full((n,), 1 / n), "positive") if n > 1 else None
        self.precondition = Preconditioner(config) if config.precond_rank else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def descend(self, x, gradient):
        """g, from x and a function that gives minus the gradient at any point."""
        moved = 0.0
        for s in range(self.config.inner_steps):
            step = self.precondition(gradient(x + moved))
            moved = moved + (step if self.eta is None else self.eta()[s] * step)
        return self.dropout(moved)


class TiedAttention(Tied):
    """
    CEM's attention [Xu]: minus the gradient in x_i, the context x_j held fixed, of

        E(x_i) = -sqrt(hs) sum_h log sum_j exp(x_i^T A_h x_j / sqrt(hs))        A_h = W_Q,h^T W_K,h (+ diag(a_h))
        g_i = sum_h (W_Q,h^T sum_j p_j W_K,h x_j (+ a_h * sum_j p_j x_j))

    So values are the keys, and the output projection is the transposed query projection. On llama W_Q, W_K end in a rotation.
    """

    def __init__(self, config):
        super().__init__(config)
        self.sqrt_hs = math.sqrt(config.n_embd / config.n_head)
        self.c_attn = Stacked(2, config.n_embd, config.n_embd, config.bias)  # W_Q and W_K
        self.a = Scalar(torch.zeros(config.n_head, 1, config.n_embd)) if config.diagonal else None

    def forward(self, x, cache=None):
        past = 0 if cache is None else cache.n
        W_Q, k = self.c_attn.weight.chunk(2)[0], self.project(x, 1, past)
        dropout = self.config.dropout if self.training else 0.0
        if cache is not None:
            (k,) = cache.extend(k)

        def gradient(x):
            o = softmax_attention(self.project(x, 0, past), k, k, dropout, scale=1 / self.sqrt_hs)
            kbar, xbar = o.tensor_split([x.size(2) // self.config.n_head], dim=3)
            if self.config.backbone == "llama":
                kbar = rotate(kbar, past, back=True)
            g = kbar.transpose(1, 2).flatten(2) @ W_Q
            return g if self.a is None else g + (self.a() * xbar).sum(1)

        return self.descend(x, gradient)

    def project(self, x, which, past=0):
        """Queries (which=0) or keys (1), (B, nh, T, hs). With diagonal hs + C wide: x_i^T diag(a) x_j is then a part of q.k."""
        heads = self.c_attn.map(which, x).unflatten(2, (self.config.n_head, -1)).transpose(1, 2)
        if self.config.backbone == "llama":
            heads = rotate(heads, past)
        if self.a is None:
            return heads
        x = x[:, None].expand(-1, self.config.n_head, -1, -1)
        return torch.cat((heads, self.a() * x if which == 0 else x), 3)


class Preconditioner(nn.Module):
    """P g with P = diag(softplus(a)) + U U^T, positive definite, U of rank precond_rank; starts near the identity [Xu]."""

    def __init__(self, config):
        super().__init__()
        self.a = Scalar(torch.ones(config.n_embd), "positive")
        self.U = nn.Parameter(torch.empty(config.n_embd, config.precond_rank))

    def forward(self, g):
        return self.a() * g + (g @ self.U) @ self.U.T


class MLP(nn.Module):
    """GPT-2's two-layer perceptron."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class SwiGLU(nn.Module):
    """Llama's gated perceptron, as large as MLP: g = W_2 (silu(W x) * V x)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Stacked(2, config.n_embd, self.width(config.n_embd), bias=False)  # W and V
        self.c_proj = nn.Linear(self.width(config.n_embd), config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        Wx, Vx = self.c_fc(x)
        return self.dropout(self.c_proj(F.silu(Wx) * Vx))

    @staticmethod
    def width(C):
        """8/3 C, rounded up to a multiple of 64."""
        return 64 * math.ceil(C / 24)


class TiedMLP(Tied):
    """
    CEM's gated MLP [Xu]: minus the gradient in x, the gate V x held fixed (Llama calls V up_proj, W gate_proj), of

        E(x) = -sum_m (V x)_m psi(w_m.x)        g = W^T (psi'(W x) * V x)

    psi' is silu on llama, which makes it SwiGLU with W_2 = W^T, and gelu on gpt2.
    """

    def __init__(self, config):
        super().__init__(config)
        C, llama = config.n_embd, config.backbone == "llama"
        self.c_fc = Stacked(2, C, SwiGLU.width(C) if llama else 4 * C, config.bias)  # W and V
        self.dpsi = F.silu if llama else F.gelu

    def forward(self, x):
        W, Vx = self.c_fc.weight.chunk(2)[0], self.c_fc.map(1, x)
        return self.descend(x, lambda y: (self.dpsi(self.c_fc.map(0, y)) * Vx) @ W)


BACKBONES = dict(gpt2=MLP, llama=SwiGLU)


def norm(config):
    """The norm layer in front of an oracle, and of the head."""
    C = config.n_embd
    return nn.RMSNorm(C, eps=1e-6) if config.backbone == "llama" else nn.LayerNorm(C, bias=config.bias)


# ---- update rules: x, v, oracles -> x, v -----------------------------------------------------------------------------
# A rule's arguments: config; n_oracles, how many oracles it asks (two under Euler splitting, else one); before, how many steps
# of the momentum come before it in the stack (n_loop adds none); weight, 1/2 if a layer asks these oracles twice, else 1.
# g(y) is the sum of what its oracles say at y.


class Gradient(nn.Module):
    """x <- x + g(x), the residual connection. A velocity passes by unchanged."""

    def __init__(self, config, n_oracles, before, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, v, *oracles):
        for g in [oracle(x) for oracle in oracles]:
            x = torch.add(x, g, alpha=self.weight)
        return x, v


class Momentum(nn.Module):
    """
    What the rules with a velocity v share. In their equations N is a LayerNorm if velocity_norm, else the identity, and
    g(y) = sum_k gamma_k g_k(y). The scalars named in `learned` are parameters, the others the config's constants.
    """

    def __init__(self, config, n_oracles, before, weight):
        super().__init__()
        learned = config.learned.split()
        # a sigmoid could not leave 0, where surgery (checkpoint.py) starts
        self.beta = Scalar(config.beta, "unit" if config.beta > 0 else "real", "beta" in learned)
        self.gamma = nn.ModuleList(Scalar(weight * config.gamma, "positive", "gamma" in learned) for _ in range(n_oracles))
        self.eta = Scalar(config.eta, "positive", "eta" in learned)
        self.mu = Scalar(config.mu, "unit", "mu" in learned) if config.mu is not None else None
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias) if config.velocity_norm else nn.Identity()
        self.implicit_steps = config.implicit_steps

    def force(self, y, oracles, onto):
        """onto + g(y). Under autocast the oracles answer in a short dtype, and the sum is made in that of `onto`."""
        for gamma, oracle in zip(self.gamma, oracles, strict=True):
            onto = onto + gamma(y) * oracle(y)
        return onto


class Polyak(Momentum):
    """v <- N(beta v + g(x));  x <- x + eta v        [Ren] MomenMHA, [Zimin]"""

    def forward(self, x, v, *oracles):
        v = self.norm(self.force(x, oracles, onto=self.beta(x) * v))
        return x + self.eta(x) * v, v


class Nesterov(Momentum):
    """
    v <- N(beta v + g(x + mu v));  x <- x + eta v        mu = eta beta unless given        [Ren] NagMHA, [Zimin]

    The look-ahead is the first iteration towards the implicit step v' = N(beta v + g(x + eta v')). implicit_steps is how
    many it takes, each from where the one before ended; IMEXFormer takes two        [name from Zimin, form derived].
    """

    def forward(self, x, v, *oracles):
        beta, eta = self.beta(x), self.eta(x)
        y = x + (eta * beta if self.mu is None else self.mu(x)) * v
        for _ in range(self.implicit_steps):
            ahead = self.norm(self.force(y, oracles, onto=beta * v))
            y = x + eta * ahead
        return y, ahead


class Adam(Momentum):
    """
    m <- beta m + (1 - beta) g(x);  s <- beta_s s + (1 - beta_s) g(x)^2;  x <- x + gamma N(m / (sqrt(s) + eps))

    v is m at first, then the pair (m, s); s starts at 1. g has no gammas.        [Gai] AdamFormer, beta_s and eps ours
    """

    beta_s, eps = 0.9, 1e-6

    def __init__(self, config, n_oracles, before, weight):
        super().__init__(config, 1, before, weight)

    def forward(self, x, v, *oracles):
        m, s = v if isinstance(v, tuple) else (v, torch.ones_like(v))
        beta, g = self.beta(x), sum(oracle(x) for oracle in oracles).to(x.dtype)
        m, s = beta * m + (1 - beta) * g, self.beta_s * s + (1 - self.beta_s) * g.square()
        return x + self.gamma[0](x) * self.norm(m / (s.sqrt() + self.eps)), (m, s)


class Dense(nn.Module):
    """
    x <- x + sum_{m<=l} w_lm g_m    control for MomenMHA, derived: its implicit skip connections as a learned lower triangular
    table w, started at eta gamma_m beta^(l-m), where gamma_m is 1/2 for what strang asks twice. v: all directions so far.
    """

    def __init__(self, config, n_oracles, before, weight):
        super().__init__()
        asked = momentum_steps(config)
        gamma = torch.tensor([1 / asked.count(what) for what in asked]).repeat(config.n_layer)[: before + 1]
        self.w = Scalar(config.eta * gamma * config.beta ** torch.arange(before, -1, -1.0))

    def forward(self, x, v, *oracles):
        v = (*(v if isinstance(v, tuple) else ()), sum(oracle(x) for oracle in oracles))
        for w, g in zip(self.w(), v, strict=True):
            x = x + w * g
        return x, v


class Sums(Gradient):
    """
    x <- x + eta (1 + beta + ... + beta^(n-1-i)) g_i(x)    control for MomenMHA, derived. There is no velocity: step i, from
    0 to n - 1, adds at once what Polyak adds of the direction g_i in the steps from i to n - 1.
    """

    def __init__(self, config, n_oracles, before, weight):
        n = config.n_layer * len(momentum_steps(config))
        super().__init__(config, n_oracles, before, weight * config.eta * sum(config.beta**m for m in range(n - before)))


RULES = dict(none=Gradient, polyak=Polyak, nesterov=Nesterov, adam=Adam, dense=Dense, sums=Sums)
# the steps of a layer, by what each asks: A attention, M the MLP. What strang takes twice has half the weight each time
SPLITTINGS = dict(lie_trotter=("A", "M"), euler=("AM",), strang=("A", "M", "A"))
MOVED = dict(attention=("A",), both=("A", "M", "AM"))  # the steps that use the momentum's rule; the others use Gradient


def momentum_steps(config):
    """The steps of a layer that use the momentum's rule, by what each asks, in their order."""
    return [asked for asked in SPLITTINGS[config.splitting] if asked in MOVED[config.momentum_on]]


# ---- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer: its two oracles, each behind its own norm, and the rules that step along them."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = TiedAttention(config) if config.tied else ENERGIES[config.energy](config)
        self.ln_2 = norm(config)
        self.mlp = TiedMLP(config) if config.tied else BACKBONES[config.backbone](config)
        self.asked, moved, self.rules = SPLITTINGS[config.splitting], MOVED[config.momentum_on], nn.ModuleList()
        before = layer * sum(asked in moved for asked in self.asked)
        for asked in self.asked:
            rule, weight = RULES[config.momentum] if asked in moved else Gradient, 1 / self.asked.count(asked)
            self.rules.append(rule(config, len(asked), before, weight))
            before += asked in moved

    def steps(self, caches=None):
        """The layer as pairs of a rule and the oracles that it asks, in order. caches: one for each call of attention."""
        left = itertools.repeat(None) if caches is None else iter(caches)
        oracles = dict(A=lambda x: self.attn(self.ln_1(x), next(left)), M=lambda x: self.mlp(self.ln_2(x)))
        return [(rule, [oracles[name] for name in asked]) for rule, asked in zip(self.rules, self.asked, strict=True)]

    def forward(self, x, v, caches=None):
        for rule, oracles in self.steps(caches):
            x, v = rule(x, v, *oracles)
        return x, v


class GPT(nn.Module):
    """
    Token and position tables, the stack of blocks, a final norm and a head tied to the token table. Weights start as
    GPT-2's: matrices normal with standard deviation 0.02, output projections with 0.02 / sqrt(2 n_layer), whatever n_loop.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        tables = dict(wte=config.vocab_size, wpe=config.block_size)
        if config.velocity_init == "embed":
            tables |= dict(vte=config.vocab_size, vpe=config.block_size)
        if config.backbone == "llama":  # whose positions are in the queries and keys
            tables = {name: n for name, n in tables.items() if name[1:] != "pe"}
        self.transformer = nn.ModuleDict({name: Embedding(n, config.n_embd) for name, n in tables.items()})
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, module in self.transformer.named_modules():
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj") else 0.02
            for p in module.parameters(recurse=False):
                if not isinstance(module, Scalar | nn.LayerNorm | nn.RMSNorm):  # these start as they were made
                    nn.init.normal_(p, std=std) if p.dim() > 1 else nn.init.zeros_(p)

    def embed(self, idx, past=0):
        """The iterate and the velocity before the first layer, (B, T, C) each. Raises ValueError beyond block_size."""
        if past + idx.size(1) > self.config.block_size:
            raise ValueError(f"{past + idx.size(1)} tokens exceed block_size={self.config.block_size}: pass the last ones")

        def table(name):
            t = self.transformer
            positions = 0 if self.config.backbone == "llama" else t[f"{name}pe"].weight[past : past + idx.size(1)]
            return t.drop(t[f"{name}te"](idx) + positions)

        x = table("w")
        if self.config.velocity_init == "zero":
            return x, torch.zeros_like(x)
        v = table("v")
        return (x + v if self.config.momentum == "none" else x), v  # EmbedControl: YuriiFormer's tables, and no velocity

    def layers(self):
        """The blocks in the order of their application."""
        return [*self.transformer.h] * self.config.n_loop

    def hidden(self, idx, caches=None, past=0):
        """
        What the head reads: the iterate after the last layer, normalised, (B, T, C). caches, a list for each of layers(), hold
        the `past` tokens before idx; if past > 0, idx is a single token.
        """
        assert past == 0 or idx.size(1) == 1
        x, v = self.embed(idx, past)
        if self.config.reversible and torch.is_grad_enabled():
            x = reversibly(x, v, self.layers())
        else:
            for i, block in enumerate(self.layers()):
                x, v = block(x, v, None if caches is None else caches[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, caches=None, past=0):
        """
        idx, targets: (B, T) int64; a target of -1 is not counted. Returns logits (B, T, vocab_size) and the mean cross entropy
        in nats per token; without targets the logits of the last position, (B, 1, vocab_size), and None.
        """
        x = self.hidden(idx, caches, past)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, top_p=1.0):
        """idx, (B, T), and stream()'s n tokens after it: (B, T + n). It takes the arguments of stream()."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, stop, top_p)), 1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, top_p=1.0):
        """
        Yields up to max_new_tokens tokens, (B, 1) each, after idx, (B, T), T >= 1. It samples softmax(logits / temperature)
        among the top_k likeliest (None: all), and of these the likeliest whose sum reaches top_p; temperature 0 takes the
        likeliest. After its first `stop` token a row is filled with `stop`. As in nanoGPT a token sees the last block_size
        tokens only; beyond block_size each token costs a whole forward pass, since every position moves.
        """
        block_size, past = self.config.block_size, 0
        calls = len(SPLITTINGS[self.config.splitting]) * self.config.implicit_steps  # of attention in a layer, at most
        caches = [[Cache(block_size) for _ in range(calls)] for _ in self.layers()]
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # less overhead than no_grad, and a token is hundreds of tiny operations
                if idx.size(1) <= block_size:
                    logits, _ = self(idx[:, past:], caches=caches, past=past)
                else:
                    logits, _ = self(idx[:, -block_size:])
                logits, past = logits[:, -1].float(), idx.size(1)
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                p = F.softmax(logits / (temperature or 1.0), -1)
                if top_p < 1:
                    likeliest, tokens = p.sort(descending=True)
                    p = p.scatter(1, tokens, likeliest.masked_fill(likeliest.cumsum(-1) - likeliest >= top_p, 0.0))
                token = p.multinomial(1) if temperature else logits.argmax(-1, keepdim=True)
                if stop is not None:
                    token = token.masked_fill(ended, stop)
                    ended |= token == stop
                idx = torch.cat((idx, token), 1)
            yield token
            if stop is not None and ended.all():
                break

    def count_parameters(self):
        """Numbers of parameters: dict(embedding=..., layers=..., scalars=...); the tied head counts as embedding."""
        embedding = sum(p.numel() for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        scalars = sum(p.numel() for m in self.modules() if isinstance(m, Scalar) for p in m.parameters())
        layers = sum(p.numel() for p in self.parameters()) - embedding - scalars
        return dict(embedding=embedding, layers=layers, scalars=scalars)


# ---- only for speed and memory: skip it on a first reading -----------------------------------------------------------


BY_MATRICES = {"cpu", "meta"}  # a CPU takes twice the time for a fused kernel; meta computes shapes alone


def sdpa(q, k, v, dropout_p=0.0, is_causal=False, scale=None):
    """
    F.scaled_dot_product_attention; on a CPU by plain matrix products, whose logits are rounded to q's dtype. Autograd keeps the
    weights: at 2,048 tokens these double the activations, so beyond that the fused kernel takes over.
    """
    if q.device.type in BY_MATRICES and is_causal and q.size(2) <= 2048:
        return in_chunks(lambda q, k: weights(q, k, scale), q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale)


def weights(q, k, scale=None):
    """The p_j of softmax_attention as a matrix, (B, nh, queries, keys)."""
    n, m = q.size(2), k.size(2)
    unseen = q.new_full((n, m), -math.inf).triu(m - n + 1)  # added within the product: cheaper than masked_fill
    logits = torch.baddbmm(unseen, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale or 1 / math.sqrt(q.size(3)))
    return logits.softmax(-1).unflatten(0, q.shape[:2])


def in_chunks(weigh, q, k, v, dropout, size=256):
    """
    sum_j w_j v_j with the matrix w = weigh(q, k), a chunk of queries at a time. A chunk needs only the keys up to its last
    query, so little work is done for keys that a query does not see.

    On devices with fused kernels it does as these do: logits are float32, and the backward pass makes the matrices again.
    """
    past, outputs, fused = k.size(2) - q.size(2), [], q.device.type not in BY_MATRICES

    def chunk(q, k, v):
        if not fused:
            return F.dropout(weigh(q, k), dropout) @ v
        with torch.autocast(q.device.type, enabled=False):
            full = torch.promote_types(q.dtype, torch.float32)
            return F.dropout(weigh(q.to(full), k.to(full)), dropout).to(v.dtype) @ v

    for i in range(0, q.size(2), size):
        seen = past + i + size
        parts = q[:, :, i : i + size], k[:, :, :seen], v[:, :, :seen]
        again = dict(use_reentrant=False, preserve_rng_state=dropout > 0)
        outputs.append(torch.utils.checkpoint.checkpoint(chunk, *parts, **again) if fused else chunk(*parts))
    return torch.cat(outputs, 2)


class Reversible(torch.autograd.Function):
    """
    A stack of polyak steps that keeps only the last x and v. The backward pass undoes a step, then differentiates it [derived]:

        v' = beta v + gamma g(x);  x' = x + eta v'        undone by        x = x' - eta v';  v = (v' - gamma g(x)) / beta

    Dividing by beta magnifies rounding at every step back. So x and v are float64 here: with float32 the gradients of 24 layers
    at beta = 0.9 come out wrong by 3e-4, of 48 layers by 2e-2. The oracles see float32.
    """

    @staticmethod
    def forward(ctx, x, v, steps, *parameters):  # steps: (rule, oracle, parameters of their block)
        ctx.steps, ctx.parameters, ctx.input_dtype = steps, parameters, x.dtype
        ctx.autocast = dict(device_type=x.device.type, dtype=torch.get_autocast_dtype(x.device.type),
                            enabled=torch.is_autocast_enabled(x.device.type))  # fmt: skip
        x, v = x.double(), v.double()
        for rule, oracle, _ in steps:
            x, v = rule(x, v, lambda x, oracle=oracle: oracle(x.to(ctx.input_dtype)).double())
        ctx.save_for_backward(x, v)
        return x.to(ctx.input_dtype)

    @staticmethod
    def backward(ctx, dx):
        (x, v), dx = ctx.saved_tensors, dx.double()
        dv, grads = torch.zeros_like(v), {p: None for p in ctx.parameters}
        for rule, oracle, own in reversed(ctx.steps):
            x = x - rule.eta() * v
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                x.requires_grad_()
                g = oracle(x.to(ctx.input_dtype)).double()
                v = ((v - rule.gamma[0]() * g) / rule.beta()).detach().requires_grad_()
                x1, v1 = rule(x, v, lambda x, g=g: g)
            dx, dv, *d = torch.autograd.grad((x1, v1), (x, v, *own), (dx, dv), allow_unused=True)
            for p, dp in zip(own, d, strict=True):
                if dp is not None:
                    grads[p] = dp if grads[p] is None else grads[p] + dp
            x, v = x.detach(), v.detach()
        return dx.to(ctx.input_dtype), dv.to(ctx.input_dtype), None, *grads.values()


@torch.compiler.disable  # compiled, its two passes would round differently, and every division by beta magnifies that
def reversibly(x, v, blocks):
    """The iterate after these blocks, by Reversible."""
    steps = [(rule, oracle, [*block.parameters()]) for block in blocks for rule, (oracle,) in block.steps()]
    return Reversible.apply(x, v, steps, *dict.fromkeys(p for _, _, own in steps for p in own))


class Cache:
    """What one attention remembers of the tokens before: keys and, if they differ, values, or a linear energy's state S."""

    def __init__(self, block_size):
        self.block_size, self.n, self.S = block_size, 0, None

    def extend(self, *new):
        """Append each tensor of `new`, (B, nh, t, width), to the kept ones of its kind, and return all that is kept."""
        if self.n == 0:
            self.kept = [t.new_empty(*t.shape[:2], self.block_size, t.size(3)) for t in new]
        past, self.n = self.n, self.n + new[0].size(2)
        for kept, t in zip(self.kept, new, strict=True):
            kept[:, :, past : self.n] = t
        return [kept[:, :, : self.n] for kept in self.kept]


class Embedding(nn.Embedding):
    """nn.Embedding, (B, T) -> (B, T, C), on a CPU by a gather, whose compiled gradient takes a seventh of the time."""

    def forward(self, idx):
        if idx.device.type != "cpu":
            return super().forward(idx)
        return self.weight.gather(0, idx.flatten()[:, None].expand(-1, self.embedding_dim)).unflatten(0, idx.shape)


# ---- what is refused: choices that make no sense together, with the reason and the remedy ----------------------------
# A new choice adds a row only if it needs another choice, or if it brings a knob of its own.

VELOCITY = {name for name, rule in RULES.items() if issubclass(rule, Momentum)}
LOOKS_AHEAD = {name for name, rule in RULES.items() if issubclass(rule, Nesterov)}
MOVING = {*RULES} - {"none"}

RANGES = {  # where numbers must lie: the test, and the names
    "must be at least 1": (lambda n: n >= 1, "n_layer n_head n_embd block_size vocab_size inner_steps implicit_steps n_loop"),
    "must be at least 0": (lambda n: n >= 0, "precond_rank"),
    "must lie in [0, 1)": (lambda n: 0 <= n < 1, "dropout beta mu"),
    "must be positive and finite": (lambda n: 0 < n < math.inf, "gamma eta delta temperature"),
    "must be finite": (math.isfinite, "tau"),
}
READ_BY = {  # knob: an axis, and its values that read the knob; with other values the knob must be as in MHA
    knob: (axis, readers)
    for knobs, axis, readers in (
        ("delta", "energy", {"huber"}),
        ("temperature", "energy", {"softmax"}),
        ("diagonal precond_rank inner_steps", "tied", {True}),
        ("momentum_on beta", "momentum", MOVING),
        ("eta", "momentum", MOVING - {"adam"}),
        ("gamma velocity_norm", "momentum", VELOCITY),
        ("velocity_init", "momentum", VELOCITY | {"none"}),  # none: EmbedControl
        ("mu implicit_steps", "momentum", LOOKS_AHEAD),
        ("tau", "curvature", {*CURVATURES}),
    )
    for knob in knobs.split()
}
NEEDS = [  # choices, what they need, and why
    (dict(curvature={*CURVATURES}), dict(energy="softmax"), "is derived for the softmax energy"),
    (dict(tied={True}), dict(energy="softmax", curvature="none", qk_norm=False, temperature=1.0),
     "is derived for plain softmax attention"),
    (dict(splitting={"euler"}, momentum=MOVING), dict(momentum_on="both"), "moves attention and MLP in one step"),
    (dict(momentum={"dense", "sums"}), dict(n_loop=1), "has weights for layers, not for loops"),
    (dict(reversible={True}),
     dict(momentum="polyak", momentum_on="both", splitting="lie_trotter", velocity_norm=False, dropout=0),
     "inverts polyak's steps and computes each twice"),
]  # fmt: skip
RELATIONS = [  # what else must hold, and what to say where it does not
    (lambda c: c.n_head < 1 or c.n_embd % c.n_head == 0,
     lambda c: f"n_embd={c.n_embd} must be a multiple of n_head={c.n_head}"),
    (lambda c: c.backbone != "llama" or c.n_head < 1 or c.n_embd // c.n_head % 2 == 0,
     lambda c: f"backbone=llama rotates pairs of numbers: n_embd / n_head={c.n_embd // c.n_head} must be even"),
    (lambda c: {*c.learned.split()} <= learnable(c),
     lambda c: f"learned={c.learned!r} may name {', '.join(sorted(learnable(c))) or 'nothing'} here: gamma, eta and beta need "
               "a velocity, beta also reversible=False; mu needs a look-ahead with mu above 0; tau needs a curvature; "
               "temperature needs energy=softmax and tied=False: take "
               f"learned={' '.join(name for name in c.learned.split() if name in learnable(c))!r}"),
    (lambda c: c.curvature not in CURVATURES or c.tau != 0 or "tau" in c.learned.split(),
     lambda c: f"curvature={c.curvature} with tau={c.tau} does nothing unless tau is learned: take "
               f"learned={' '.join([*(name for name in c.learned.split() if name in learnable(c)), 'tau'])!r}"),
    (lambda c: not c.reversible or c.beta ** max(0, 2 * c.n_layer * c.n_loop) > 1e-8,
     lambda c: f"reversible=True divides by beta={c.beta} twice in each of {c.n_layer} x {c.n_loop} layers, more than float64 "
               f"can bear: take beta of at least {1e-8 ** (0.5 / c.n_layer / c.n_loop) + 0.005:.2f}"),
]  # fmt: skip


def learnable(c):
    """The scalars of a configuration that can be learned."""
    moving = c.momentum in VELOCITY
    can = dict(gamma=moving, eta=moving and c.momentum != "adam", beta=moving and not c.reversible,
               mu=c.momentum in LOOKS_AHEAD and c.mu, tau=c.curvature != "none",
               temperature=c.energy == "softmax" and not c.tied)  # fmt: skip
    return {name for name, is_so in can.items() if is_so}


@functools.cache
def axes(cls):
    """The choices of a configuration class and their values, read off its annotations: {name: (value, ...)}."""
    hints = {name: {hint, *typing.get_args(hint)} for name, hint in typing.get_type_hints(cls).items()}
    named = {name: typing.get_args(h) for name, kinds in hints.items() for h in kinds if typing.get_origin(h) is Literal}
    return named | {name: (False, True) for name, kinds in hints.items() if kinds >= {bool, type(None)}}


OF_MHA = {axis: values[0] for axis, values in axes(GPTConfig).items()} | NUMBERS


def resolved(config):
    """{choice: what None means}: the variant's value; MHA's if the variant gives none, or if by READ_BY nothing reads it."""
    row = OF_MHA | VARIANTS.get(config.variant, {})
    chosen = {name: row[name] if getattr(config, name) is None else getattr(config, name) for name in OF_MHA}
    unread = {knob for knob, (axis, readers) in READ_BY.items() if chosen[axis] not in readers}
    learned = " ".join(name for name in row["learned"].split() if name not in unread)
    return {name: value if name in unread else row[name] for name, value in OF_MHA.items()} | dict(learned=learned)


def outside(config, ranges):
    """An error message for each number of a configuration that lies outside its range. None is always legal."""
    numbers = [(name, getattr(config, name), rule, test) for rule, (test, names) in ranges.items() for name in names.split()]
    return [f"{name}={n} {rule}" for name, n, rule, test in numbers if n is not None and not test(n)]


def refused(c):
    """An error message for each thing that is wrong with a configuration."""
    problems = outside(c, RANGES) + [message(c) for holds, message in RELATIONS if not holds(c)]
    legal = dict(variant=(*VARIANTS,)) | axes(type(c))
    wrong = [name for name in legal if getattr(c, name) not in legal[name]]
    for name in wrong:
        near = difflib.get_close_matches(str(getattr(c, name)), map(str, legal[name]), n=1, cutoff=0.4)
        values = ", ".join(str(value) or '""' for value in legal[name]) + (f"; did you mean {near[0]}?" if near else "")
        problems.append(f"{name}={getattr(c, name)!r} is none of {values}")
    for knob, (axis, readers) in READ_BY.items():
        if axis not in wrong and getattr(c, axis) not in readers and getattr(c, knob) != OF_MHA[knob]:
            problems.append(f"{knob}={getattr(c, knob)!r} belongs to {axis}={' or '.join(sorted(map(str, readers)))}: "
                            f"with {axis}={getattr(c, axis)} take {knob}={OF_MHA[knob]!r}")  # fmt: skip
    for choices, needs, why in NEEDS:
        lacking = " and ".join(f"{name}={value}" for name, value in needs.items() if getattr(c, name) != value)
        if lacking and not set(wrong) & {*choices, *needs} and all(getattr(c, axis) in v for axis, v in choices.items()):
            chosen, others = (" or ".join(f"{axis}={values[axis]}" for axis in choices) for values in (vars(c), OF_MHA))
            problems.append(f"{chosen.replace(' or ', ' with ')} {why}: take {lacking}, or {others}")
    return problems
