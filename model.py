"""
nanoDescent: a GPT in which every attention and every layer is a step of an optimizer.

The residual stream x is the iterate. A sublayer is an oracle: given x it returns a descent direction g. An update
rule moves the iterate, and may carry a velocity v from layer to layer. One block serves every variant:

    x, v = step(x, v, attention);   x, v = step(x, v, mlp)

so a variant is three independent choices, tabulated in VARIANTS below, and nothing else knows its name:

    energy      what does attention descend?
    curvature   how is the gradient preconditioned?
    momentum    how does the iterate move?

The variant MHA is nanoGPT's model with nanoGPT's parameter names. In shapes, B is the number of sequences, T of
tokens, C = n_embd, nh = n_head, hs = C / nh. In equations, T is the temperature sqrt(hs). Sources, by arXiv id:

    [Ren]    2511.00907   Transformers as Intrinsic Optimizers: Forward Inference through the Energy Principle
    [Zimin]  2601.23236   YuriiFormer: A Suite of Nesterov-Accelerated Transformers
    [Xu]     2605.07588   Causal Energy Minimization
    [Gai]    2605.24425   Momentum Streams
"""

import difflib
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# ----------------------------------------------------------------------------------------------------------------------
# the choices

# The axes and their values; MHA takes the first of each.
AXES = dict(
    energy=("softmax", "linear", "gated_linear", "huber"),
    curvature=("none", "newton", "light"),
    momentum=("none", "polyak", "nesterov", "triple", "verlet", "imex", "dense"),
    momentum_on=("attention", "both"),
    splitting=("lie_trotter", "euler"),
    velocity_init=("zero", "embed"),
    velocity_norm=(False, True),
    tied=(False, True),
    diagonal=(False, True),
    qk_norm=(False, True),
    reversible=(False, True),
)
# The numbers that go with them.
NUMBERS = dict(beta=0.5, gamma=1.0, mu=None, eta=1.0, learned="", delta=1.0, precond_rank=0, inner_steps=1, n_loop=1)

# What the systems of [Zimin] and [Gai] share.
FORMER = dict(momentum_on="both", velocity_init="embed", velocity_norm=True, learned="beta gamma", beta=0.9)
YURII = FORMER | dict(momentum="nesterov", learned="beta gamma mu", mu=0.9)
# A paper's name: what it chooses differently from MHA, and where it stands.
VARIANTS = {
    "MHA": dict(source="nanoGPT"),
    "MomenMHA": dict(source="[Ren]", momentum="polyak"),
    "NagMHA": dict(source="[Ren]", momentum="nesterov", beta=0.9),
    "MHA2nd1st": dict(source="[Ren], form derived", curvature="newton"),
    "LightMHA2nd1st": dict(source="[Ren], form derived", curvature="light"),
    "LinearMHA": dict(source="[Ren]", energy="linear"),
    "GatedLinearMHA": dict(source="[Ren]", energy="gated_linear"),
    "HuberMHA": dict(source="[Ren] asks, derived", energy="huber"),
    "DenseMHA": dict(source="control for MomenMHA", momentum="dense"),
    "YuriiFormer": dict(source="[Zimin]") | YURII,
    "YuriiFormerEuler": dict(source="[Zimin]") | YURII | dict(splitting="euler"),
    "PolyakFormer": dict(source="[Zimin]") | FORMER | dict(momentum="polyak"),
    "VerletFormer": dict(source="[Zimin], form derived") | FORMER | dict(momentum="verlet"),
    "IMEXFormer": dict(source="[Zimin], form derived") | FORMER | dict(momentum="imex"),
    "TMMFormer": dict(source="[Gai]") | YURII | dict(momentum="triple", learned="beta gamma mu eta"),
    "EmbedControl": dict(source="[Gai], control for YuriiFormer", velocity_init="embed"),
    "CEM": dict(source="[Xu]", tied=True),
    "CEM+": dict(source="[Xu]", tied=True, diagonal=True, precond_rank=8, inner_steps=2),
    "LoopNagMHA": dict(source="[Ren] asks", momentum="nesterov", beta=0.9, n_loop=4),
}


@dataclass
class GPTConfig:
    """nanoGPT's sizes, a variant, and overrides: a choice left at None is the variant's. A ValueError names every problem."""

    variant: str = "MHA"  # a paper's name for a set of choices: a row of VARIANTS in model.py
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # width of the residual stream
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the token table
    dropout: float = 0.0  # share of activations dropped in training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    energy: str | None = None  # what attention descends: softmax, linear, gated_linear, huber
    curvature: str | None = None  # how its gradient is preconditioned: none, newton, light
    momentum: str | None = None  # how the iterate moves: none, polyak, nesterov, triple, verlet, imex, dense
    momentum_on: str | None = None  # the sublayers that share the velocity: attention, both
    splitting: str | None = None  # a step on attention, then one on the MLP: lie_trotter; one on both: euler
    velocity_init: str | None = None  # the velocity before the first layer: zero, embed (tables of its own)
    velocity_norm: bool | None = None  # a LayerNorm on the velocity, at every step
    tied: bool | None = None  # values are the keys, output projections are transposed input projections
    diagonal: bool | None = None  # tied: a diagonal term in every head's interaction
    qk_norm: bool | None = None  # give all queries one norm and all keys one norm
    reversible: bool | None = None  # rebuild activations in the backward pass instead of storing them
    beta: float | None = None  # velocity kept from one step to the next, in [0, 1)
    gamma: float | None = None  # weight of the oracle in the velocity, positive
    mu: float | None = None  # nesterov, triple: how far to look ahead along the velocity; else eta beta
    eta: float | None = None  # length of the step along the velocity, positive
    learned: str | None = None  # which of "beta gamma mu eta" each layer learns; the others stay fixed
    delta: float | None = None  # huber: distance, in units of sqrt(hs), beyond which a key's pull is constant
    precond_rank: int | None = None  # tied: rank of the learned preconditioner; 0: none
    inner_steps: int | None = None  # tied: attention steps in a layer, on the same keys
    n_loop: int | None = None  # times that the stack of blocks is applied

    def __post_init__(self):
        row = VARIANTS.get(self.variant, {})
        if (self.momentum or row.get("momentum")) not in ("nesterov", "triple"):  # no look-ahead
            row = row | dict(mu=None, learned=row.get("learned", "").replace(" mu", ""))
        for name, default in ({axis: values[0] for axis, values in AXES.items()} | NUMBERS).items():
            if getattr(self, name) is None:
                setattr(self, name, row.get(name, default))
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self):
        """What is wrong with this configuration: for each thing the value, the rule and the remedy."""
        near = difflib.get_close_matches(str(self.variant), VARIANTS, n=1, cutoff=0.4)
        names, velocity = set(self.learned.split()), self.momentum not in ("none", "dense")
        steps = 2 * self.n_layer * self.n_loop
        # fmt: off
        rules = [  # what must hold, and what to say where it doesn't
            (self.variant in VARIANTS, f"variant={self.variant!r} is none of {', '.join(VARIANTS)}"
             + (f"; did you mean {near[0]}?" if near else "")),
            *((getattr(self, axis) in values, f"{axis}={getattr(self, axis)!r} is none of {', '.join(map(str, values))}")
              for axis, values in AXES.items()),
            *((getattr(self, n) is None or getattr(self, n) > 0, f"{n}={getattr(self, n)} must be at least 1")
              for n in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "inner_steps", "n_loop")),
            (self.n_head < 1 or self.n_embd % self.n_head == 0,
             f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}"),
            (0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)"),
            (0 <= self.beta < 1, f"beta={self.beta} must lie in [0, 1)"),
            *((getattr(self, n) > 0, f"{n}={getattr(self, n)} must be positive") for n in ("gamma", "eta", "delta")),
            (self.mu is None or 0 <= self.mu < 1, f"mu={self.mu} must lie in [0, 1)"),
            (self.precond_rank >= 0, f"precond_rank={self.precond_rank} must be at least 0"),
            (names <= {"beta", "gamma", "mu", "eta"}, f"learned={self.learned!r} may name beta, gamma, mu and eta"),
            (self.curvature == "none" or self.energy == "softmax",
             f"curvature={self.curvature} is derived for energy=softmax: with energy={self.energy} take curvature=none"),
            (self.momentum != "none" or self.momentum_on == "attention",
             "momentum_on=both needs something to carry on: take another momentum than none"),
            *((velocity or getattr(self, n) == default,
               f"{n}={getattr(self, n)!r} belongs to a velocity, momentum={self.momentum} has none: take {n}={default!r}")
              for n, default in dict(learned="", velocity_norm=False, gamma=1.0).items()),
            *((self.momentum != "none" or getattr(self, n) == NUMBERS[n], f"{n}={getattr(self, n)} belongs to a momentum")
              for n in ("beta", "eta")),
            (self.momentum != "dense" or self.velocity_init == "zero",
             "velocity_init=embed belongs to a velocity, momentum=dense has none: take velocity_init=zero"),
            (self.momentum in ("nesterov", "triple") or (self.mu is None and "mu" not in names),
             f"mu is the look-ahead of nesterov and triple, momentum={self.momentum} has none: leave mu out"),
            (self.energy == "huber" or self.delta == NUMBERS["delta"], f"delta={self.delta} belongs to energy=huber"),
            (self.momentum != "dense" or self.n_loop == 1,
             f"momentum=dense learns a weight for each pair of layers, not of n_loop={self.n_loop} rounds: take n_loop=1"),
            ("mu" not in names or self.mu, f"learned={self.learned!r} needs a mu in (0, 1) to start from: give mu"),
            (self.splitting == "lie_trotter" or self.momentum == "none" or self.momentum_on == "both",
             "splitting=euler moves attention and MLP in one step: take momentum_on=both"),
            (self.momentum != "verlet" or (self.momentum_on == "both" and self.splitting == "lie_trotter"),
             "momentum=verlet kicks with attention, drifts and kicks with the MLP: "
             "take momentum_on=both and splitting=lie_trotter"),
            *((not self.tied or getattr(self, n) == value, f"tied=True descends the energy of x itself: take {n}={value}")
              for n, value in dict(curvature="none", energy="softmax", qk_norm=False).items()),
            *((self.tied or getattr(self, n) == NUMBERS.get(n, False), f"{n}={getattr(self, n)} belongs to tied=True")
              for n in ("diagonal", "precond_rank", "inner_steps")),
            (not self.reversible or (self.momentum, self.momentum_on, self.splitting, self.velocity_norm)
             == ("polyak", "both", "lie_trotter", False), "reversible=True inverts polyak's steps: take momentum=polyak, "
             "momentum_on=both, splitting=lie_trotter and velocity_norm=False"),
            (not self.reversible or self.dropout == 0, "reversible=True computes every oracle twice: take dropout=0"),
            (not self.reversible or self.beta**steps > 1e-8,
             f"reversible=True divides by beta={self.beta} at each of {steps} steps back, more than float64 can bear: "
             f"take beta of at least {1e-8 ** (1 / max(1, steps)) + 0.005:.2f}"),
        ]
        # fmt: on
        return [problem for holds, problem in rules if not holds]


# ----------------------------------------------------------------------------------------------------------------------
# energies and curvatures: q, k, v -> o, each (B, nh, T, hs). A position sees itself and those before it; a lone query
# is the last position, as in generation, and sees every key.


def softmax_attention(q, k, v, dropout=0.0, scale=None):
    """
    A gradient step on the free energy F(q) = -T log sum_j exp(q.k_j / T), values free [Ren]:

        o = sum_j p_j v_j        p_j = softmax_j(q.k_j / T)        (v = k gives k̄ = -grad F)

    scale: 1 / T, if T is not sqrt of q's width.
    """
    # on a CPU matrices take half the time of the fused kernel's two passes, though their logits are rounded to q's dtype; to
    # keep them for the backward pass doubles the activations at 2,048 tokens (bfloat16), so no further
    if q.device.type == "cpu" and 1 < q.size(2) <= 2048:
        return in_chunks(lambda q, k: weights(q, k, scale), q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1, scale=scale)


def weights(q, k, scale=None):
    """The p_j of softmax_attention as a matrix, (B, nh, queries, keys)."""
    n, m = q.size(2), k.size(2)
    unseen = q.new_full((n, m), -math.inf).triu(m - n + 1)  # added within the product, which is cheaper than to fill
    logits = torch.baddbmm(unseen, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale or 1 / math.sqrt(q.size(3)))
    return logits.softmax(-1).unflatten(0, q.shape[:2])


def in_chunks(weigh, q, k, v, dropout, size=256):
    """
    sum_j w_j v_j with the matrix w = weigh(q, k), a chunk of queries at a time: that needs only the keys up to its last, so
    in sequences of several chunks little work is done for keys that a query does not see.
    """
    past, outputs = k.size(2) - q.size(2), []
    for i in range(0, q.size(2), size):
        seen = past + i + size
        outputs.append(F.dropout(weigh(q[:, :, i : i + size], k[:, :, :seen]), dropout) @ v[:, :, :seen])
    return torch.cat(outputs, 2)


def newton_attention(q, k, v, tau, dropout=0.0):
    """
    MHA2nd1st [Ren; form derived]: a Newton step on the free energy of E_j = |q - k_j|^2 / 2, with its inverse Hessian
    (I - C/T)^-1, C = Cov_p(k), replaced by the Taylor polynomial I + C/T. This reweights attention:

        u = k̄ - q        s_j = (k_j - k̄).u / T        w_j = p_j (1 + tau s_j)        o = sum_j w_j v_j

    tau: (nh, 1, 1). tau = 0 is softmax attention; tau = 1, v = k and keys of one norm make it the exact Taylor step.
    """

    def reweigh(q, k):
        p = weights(q, k)
        kbar = p @ k
        u = (kbar - q) * tau / math.sqrt(q.size(3))  # tau and 1 / T here, where there are fewest numbers to multiply
        return p * (u @ k.mT + (1 - (u * kbar).sum(-1, keepdim=True)))

    return in_chunks(reweigh, q, k, v, dropout)


def light_attention(q, k, v, tau, dropout=0.0):
    """
    LightMHA2nd1st [Ren names it; form derived]: to first order 1 + tau s_j is exp(tau s_j), and p_j times an
    exponential is attention at a moved query: two calls of it for MHA2nd1st to first order in tau.

        k̄ = A(q, K, K)        o = A(q + tau (k̄ - q), K, V)
    """
    kbar = softmax_attention(q, k, k)
    return softmax_attention(q + tau * (kbar - q), k, v, dropout)


def huber_attention(q, k, v, delta, dropout=0.0):
    """
    HuberMHA [Ren's open question; derived]: a gradient step on the free energy of E_j = H(|q - k_j|), where H(r) is
    r^2 / 2 up to r = delta and delta (r - delta / 2) beyond; its pull on the query never exceeds delta. Values free:

        o = sum_j p_j min(1, delta / r_j) v_j        p_j = softmax_j(-E_j / T)        r_j = |q - k_j|
    """

    def pull(q, k):
        r = distances(q, k)
        logits = -huber(r, delta) / math.sqrt(q.size(3))
        return logits.masked_fill(~causal(q, k), -math.inf).softmax(-1) * (delta / r).clamp(max=1)

    return in_chunks(pull, q, k, v, dropout)


def huber(r, delta):
    """H(r), elementwise."""
    return torch.where(r <= delta, r.square() / 2, delta * (r - delta / 2))


def distances(q, k):
    """|q_i - k_j|, (B, nh, queries, keys), by one matrix product."""
    squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1)[..., None, :] - 2 * q @ k.mT
    return squares.clamp(min=1e-6).sqrt()  # away from 0, where the root has no gradient


def linear_attention(q, k, v, log_a, S=None, chunk=64):
    """
    A gradient step on sum_j a_{j+1} ... a_i E_j with E_j = -(q.k_j)^2 / 2, values free [Ren]; LinearMHA has a = 1:

        S_i = a_i S_{i-1} + k_i v_i^T        o_i = S_i^T q_i = sum_{j<=i} a_{j+1} ... a_i (q_i.k_j) v_j

    Matrix products within all chunks of tokens at once, the state S from chunk to chunk: O(T hs (hs + chunk)) in time.
    log_a: (B, nh, T), float32, <= 0. S: (B, nh, hs, hs), float32, after the tokens before q; None if there are none.
    Returns o and the S after the last token.
    """
    if q.dtype == torch.float16:  # cannot hold a sum over many keys
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention(q.float(), k.float(), v.float(), log_a, S, chunk)
    T = q.size(2)
    chunk = min(chunk, T)
    q, k, v = (F.pad(t, (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk)) for t in (q, k, v))  # (B, nh, chunks, chunk, hs)
    b = F.pad(log_a, (0, -T % chunk)).unflatten(2, (-1, chunk)).cumsum(-1)  # log decay since the chunk began
    KV = (k * (b[..., -1:] - b).exp()[..., None]).mT @ v  # what each chunk adds to S: (B, nh, chunks, hs, hs)
    states = [torch.zeros_like(KV[:, :, 0]) if S is None else S]  # after 0, 1, 2, ... chunks
    for a, kv in zip(b[..., -1:, None].exp().unbind(2), KV.unbind(2), strict=True):
        states.append(a * states[-1] + kv)
    o = (q @ k.mT * decays(b)) @ v + (q * b.exp()[..., None]) @ torch.stack(states[:-1], 2)
    return o.flatten(2, 3)[:, :, :T], states[-1]


def decays(b):
    """From log decays b since some start, (..., n), the decay from j to i, which is 0 for j > i: (..., n, n)."""
    return (b[..., :, None] - b[..., None, :]).masked_fill(~causal(b[..., None], b[..., None]), -math.inf).exp()


def causal(q, k):
    """(queries, keys) bool: the keys that each query sees."""
    n, m = q.size(-2), k.size(-2)
    return torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)


# ----------------------------------------------------------------------------------------------------------------------
# oracles: x -> descent direction, both (B, T, C)


class Scalar(nn.Module):
    """Numbers kept in their range: parameters seen through a map onto the range or, if not learned, a constant."""

    MAPS = dict(  # range: (map, its inverse)
        real=(lambda a: a, lambda y: y),
        unit=(torch.sigmoid, torch.logit),  # (0, 1)
        positive=(F.softplus, lambda y: y + torch.log(-torch.expm1(-y))),  # (0, inf)
    )

    def __init__(self, value, range="real", learned=True):
        """value: a number or, to learn several at once, a tensor of where they start."""
        super().__init__()
        self.value, (self.map, inverse) = value, self.MAPS[range]
        self.raw = nn.Parameter(inverse(torch.as_tensor(value, dtype=torch.float32))) if learned else None

    def forward(self):
        return self.value if self.raw is None else self.map(self.raw)

    def of_each(self, x):
        """
        A number for each token of x, (B, T, 1), if it is learned: compiled, its gradient is then summed in the passes over a
        token that a norm makes anyway, not in passes of its own.
        """
        value = self()
        return value if self.raw is None else value.expand(*x.shape[:2], 1)


class Attention(nn.Module):
    """Multi-head attention: a step on the config's energy, preconditioned by its curvature."""

    def __init__(self, config):
        super().__init__()
        C, nh = config.n_embd, config.n_head
        self.config, self.temperature = config, math.sqrt(C / nh)
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.curvature != "none":
            self.tau = Scalar(torch.zeros(nh, 1, 1))  # starts as MHA
        if config.energy == "gated_linear":
            self.c_gate = nn.Linear(C, nh)
            # spreads the heads' memories: at first they forget half of what they saw in 1 to 280 tokens
            self.register_buffer("horizon", torch.linspace(0, 6, nh)[:, None], persistent=False)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.energy in ("linear", "gated_linear"):
            o, S = linear_attention(q, k, v, self.log_gate(x), cache and cache.S)
            if cache is not None:
                cache.S = S
            o = F.rms_norm(o, o.shape[3:], eps=1e-5)  # a sum over the past, not a mean: keeps its scale
        else:
            if cache is not None:
                k, v = cache.extend(k, v)
            match self.config.energy, self.config.curvature:
                case "softmax", "none":
                    o = softmax_attention(q, k, v, dropout)
                case "softmax", "newton":
                    o = newton_attention(q, k, v, self.tau(), dropout)
                case "softmax", "light":
                    o = light_attention(q, k, v, self.tau(), dropout)
                case "huber", _:
                    o = huber_attention(q, k, v, self.config.delta * self.temperature, dropout)
        return self.resid_dropout(self.c_proj(o.transpose(1, 2).reshape(B, T, C)))

    def free_energy(self, x, context):
        """
        The free energy of the queries at x among the keys at context, (B, nh, T), and the p_j of its gradient,
        (B, nh, T, T), as they are before a curvature or Huber's cut reweigh them. The linear energies are plain sums: None.
        """
        q, k = self.qkv(x)[0], self.qkv(context)[1]
        seen = causal(q, k)
        if self.config.energy in ("linear", "gated_linear"):
            D = decays(self.log_gate(context).cumsum(-1))
            return (-(q @ k.mT).square() / 2 * D).sum(-1), None
        E = huber(distances(q, k), self.config.delta * self.temperature) if self.config.energy == "huber" else -q @ k.mT
        logits = (-E / self.temperature).masked_fill(~seen, -math.inf)
        return -self.temperature * logits.logsumexp(-1), logits.softmax(-1)

    def qkv(self, x):
        """Queries, keys and values, (B, nh, T, hs) each."""
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.config.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=2))
        if self.config.qk_norm:
            q, k = F.rms_norm(q, q.shape[3:]), F.rms_norm(k, k.shape[3:])
        return q, k, v

    def log_gate(self, x):
        """log a: (B, nh, T), <= 0 by construction and in float32, where a sum over many tokens stays exact."""
        precise = torch.promote_types(x.dtype, torch.float32)
        if self.config.energy == "linear":
            return x.new_zeros(x.size(0), self.config.n_head, x.size(1), dtype=precise)
        return F.logsigmoid(self.c_gate(x).mT.to(precise) + self.horizon)


class TiedAttention(nn.Module):
    """
    CEM's attention [Xu]: minus the gradient in x_i, the context x_j held fixed, of

        E(x_i) = -T sum_h log sum_j exp(x_i^T A_h x_j / T)        A_h = W_Q,h^T W_K,h (+ diag(a_h))
        g_i = sum_h (W_Q,h^T sum_j p_j W_K,h x_j (+ a_h * sum_j p_j x_j))

    (with biases the queries and keys are affine in x). So the values are the keys and the output projection is the
    transposed query projection. inner_steps > 1 descends again from the moved x, on the same keys:
    g = sum_s eta_s P g_i(x_i + the steps so far), P the preconditioner.
    """

    def __init__(self, config):
        super().__init__()
        C, n = config.n_embd, config.inner_steps
        self.config, self.temperature = config, math.sqrt(C / config.n_head)
        self.c_attn = nn.Linear(C, 2 * C, bias=config.bias)  # W_Q and W_K
        self.a = Scalar(torch.zeros(config.n_head, 1, C)) if config.diagonal else None
        self.eta = Scalar(torch.full((n,), 1 / n), "positive") if n > 1 else None
        self.precondition = Preconditioner(config) if config.precond_rank else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        W_Q = self.c_attn.weight.chunk(2)[0]
        k = self.project(x, 1)
        if cache is not None:
            (k,) = cache.extend(k)
        moved = 0.0
        for s in range(self.config.inner_steps):
            q = self.project(x + moved, 0)
            o = softmax_attention(q, k, k, self.config.dropout if self.training else 0.0, scale=1 / self.temperature)
            kbar, xbar = o.tensor_split([x.size(2) // self.config.n_head], dim=3)
            g = kbar.transpose(1, 2).flatten(2) @ W_Q
            if self.a is not None:
                g = g + (self.a() * xbar).sum(1)
            step = self.precondition(g)
            moved = moved + (step if self.eta is None else self.eta()[s] * step)
        return self.resid_dropout(moved)

    def free_energy(self, x, context):
        """As Attention's; summed over heads it is E of the class's docstring."""
        logits = self.project(x, 0) @ self.project(context, 1).mT / self.temperature
        logits = logits.masked_fill(~causal(logits, logits), -math.inf)
        return -self.temperature * logits.logsumexp(-1), logits.softmax(-1)

    def project(self, x, which):
        """Queries (0) or keys (1), (B, nh, T, hs); the diagonal's x_i^T diag(a) x_j is a product too and makes it hs + C."""
        W, b = (t if t is None else t.chunk(2)[which] for t in (self.c_attn.weight, self.c_attn.bias))
        heads = F.linear(x, W, b).unflatten(2, (self.config.n_head, -1)).transpose(1, 2)
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


class TiedMLP(nn.Module):
    """
    CEM's gated MLP [Xu]: minus the gradient in x, the gate V x held fixed, of

        E(x) = -sum_m (V x)_m psi(w_m.x)        g = W^T (psi'(W x) * V x)        psi' = gelu
    """

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 8 * config.n_embd, bias=config.bias)  # W and V: as large as MLP's two
        self.precondition = Preconditioner(config) if config.precond_rank else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        W = self.c_fc.weight.chunk(2)[0]
        Wx, Vx = self.c_fc(x).chunk(2, dim=2)
        return self.dropout(self.precondition((F.gelu(Wx) * Vx) @ W))


# ----------------------------------------------------------------------------------------------------------------------
# update rules: x, v, oracles -> x, v


class Gradient(nn.Module):
    """x <- x + sum_k g_k(x), the residual connection. A velocity passes by unchanged."""

    def forward(self, x, v, *oracles):
        for g in [oracle(x) for oracle in oracles]:
            x = x + g
        return x, v


class Momentum(nn.Module):
    """
    A step with a velocity v, which runs through depth:

        v <- N(beta v + sum_k gamma_k g_k(x + mu v));        x <- x + eta v

        polyak      mu = 0                                                    [Ren] MomenMHA, [Zimin]
        nesterov    mu = eta beta, or mu of its own                           [Ren] NagMHA, [Zimin]
        triple      nesterov with its own eta, learned ([Gai]'s nu)           [Gai]
        verlet      mu = 0; attention kicks and x drifts, the MLP only kicks, but for a last drift
                    after the last layer of a round, whose MLP would not count without it  (derived)
        imex        mu = 0; friction implicit: v <- N(v + sum_k gamma_k g_k) / (1 + lambda), where beta = 1 / (1 + lambda).
                    It stands outside N, which forgets the length of what it is given       (derived)

    N is a LayerNorm if velocity_norm, else the identity. k counts the oracles: one, or attention and MLP under Euler
    splitting. Of the scalars, those named in `learned` are parameters, the others the config's constants.
    """

    def __init__(self, config, n_oracles, drift):
        super().__init__()
        learned = config.learned.split() + ["eta"] * (config.momentum == "triple")
        self.implicit, self.drift = config.momentum == "imex", drift
        self.looks_ahead, self.mu = config.momentum in ("nesterov", "triple"), None
        # a sigmoid could not leave 0, where surgery starts
        self.beta = Scalar(config.beta, "unit" if config.beta > 0 else "real", "beta" in learned)
        self.gamma = nn.ModuleList(Scalar(config.gamma, "positive", "gamma" in learned) for _ in range(n_oracles))
        if drift:
            self.eta = Scalar(config.eta, "positive", "eta" in learned)
        if self.looks_ahead and config.mu is not None:
            self.mu = Scalar(config.mu, "unit", "mu" in learned)
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias) if config.velocity_norm else nn.Identity()

    def forward(self, x, v, *oracles):
        beta = self.beta.of_each(x)
        eta = self.eta.of_each(x) if self.drift else 0.0
        mu = self.mu.of_each(x) if self.mu is not None else eta * beta
        y = x + mu * v if self.looks_ahead else x
        v = v if self.implicit else beta * v
        for gamma, oracle in zip(self.gamma, oracles, strict=True):
            v = v + gamma.of_each(x) * oracle(y)
        v = beta * self.norm(v) if self.implicit else self.norm(v)
        return (x + eta * v if self.drift else x), v


class Dense(nn.Module):
    """
    DenseMHA, the explicit form of MomenMHA's implicit skip connections: a learned lower triangular table w, started
    at eta beta^(l-m), weighs all directions so far; v is their tuple (control, derived).

        x <- x + sum_{m<=l} w_lm g_m
    """

    def __init__(self, config, past):
        super().__init__()
        self.w = Scalar(config.eta * config.beta ** torch.arange(past, -1, -1.0))

    def forward(self, x, v, *oracles):
        v = (*(v if isinstance(v, tuple) else ()), sum(oracle(x) for oracle in oracles))
        for w, g in zip(self.w(), v, strict=True):
            x = x + w * g
        return x, v


def rules(config, layer):
    """The update rules of a layer: attention's and the MLP's, or one for both under Euler splitting."""
    n = 1 if config.splitting == "euler" else 2
    moving = 0 if config.momentum == "none" else 1 if config.momentum_on == "attention" else n
    if config.momentum == "dense":
        moving_rules = [Dense(config, past=moving * layer + i) for i in range(moving)]
    else:
        last = layer == config.n_layer - 1
        drifts = [i == 0 or last or config.momentum != "verlet" for i in range(moving)]
        moving_rules = [Momentum(config, 3 - n, drift) for drift in drifts]
    return nn.ModuleList(moving_rules + [Gradient() for _ in range(n - moving)])


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Block(nn.Module):
    """One layer: its two oracles, each behind its own LayerNorm, and the rules that step along them."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = TiedAttention(config) if config.tied else Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = TiedMLP(config) if config.tied else MLP(config)
        self.rules = rules(config, layer)

    def steps(self, cache=None):
        """The layer as pairs of a rule and its oracles, in the order of the steps."""
        A, M = lambda x: self.attn(self.ln_1(x), cache), lambda x: self.mlp(self.ln_2(x))
        return [(self.rules[0], (A, M))] if len(self.rules) == 1 else [(self.rules[0], (A,)), (self.rules[1], (M,))]

    def forward(self, x, v, cache=None):
        for rule, oracles in self.steps(cache):
            x, v = rule(x, v, *oracles)
        return x, v


class Reversible(torch.autograd.Function):
    """
    A stack of polyak steps that keeps only its end: the backward pass undoes each step before it differentiates it
    [Ren's open question; derived].

        v' = beta v + gamma g(x);  x' = x + eta v'        undone by        x = x' - eta v';  v = (v' - gamma g(x)) / beta

    Dividing by beta magnifies rounding at every step back, which is why x and v are float64 here: with float32 the
    gradients of 24 layers at beta = 0.9 come out wrong by 3e-4, of 48 layers by 2e-2. The oracles see float32.
    """

    @staticmethod
    def forward(ctx, x, v, steps, *parameters):
        ctx.steps, ctx.parameters, ctx.input_dtype = steps, parameters, x.dtype
        ctx.autocast = dict(device_type=x.device.type, dtype=torch.get_autocast_dtype(x.device.type),
                            enabled=torch.is_autocast_enabled(x.device.type))  # fmt: skip
        x, v = x.double(), v.double()
        for rule, (oracle,) in steps:
            x, v = rule(x, v, lambda x, oracle=oracle: oracle(x.to(ctx.input_dtype)).double())
        ctx.save_for_backward(x, v)
        return x.to(ctx.input_dtype)

    @staticmethod
    def backward(ctx, dx):
        x, v = ctx.saved_tensors
        dx = dx.double()
        dv, grads = torch.zeros_like(v), {p: None for p in ctx.parameters}
        for rule, (oracle,) in reversed(ctx.steps):
            x = x - rule.eta() * v
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                x.requires_grad_()
                g = oracle(x.to(ctx.input_dtype)).double()
                v = ((v - rule.gamma[0]() * g) / rule.beta()).detach().requires_grad_()
                x1, v1 = rule(x, v, lambda x, g=g: g)
            dx, dv, *d = torch.autograd.grad((x1, v1), (x, v, *grads), (dx, dv), allow_unused=True)
            for p, dp in zip(grads, d, strict=True):
                if dp is not None:
                    grads[p] = dp if grads[p] is None else grads[p] + dp
            x, v = x.detach(), v.detach()
        return dx.to(ctx.input_dtype), dv.to(ctx.input_dtype), None, *grads.values()


class Cache:
    """What one attention remembers of the tokens before: keys and, if they differ, values, or a linear energy's state S."""

    def __init__(self, block_size):
        self.block_size, self.n, self.S = block_size, 0, None

    def extend(self, *new):
        """Append each of new, (B, nh, t, its width), to what is kept of its kind, and return all that is kept."""
        if self.n == 0:
            self.kept = [t.new_empty(*t.shape[:2], self.block_size, t.size(3)) for t in new]
        past, self.n = self.n, self.n + new[0].size(2)
        for kept, t in zip(self.kept, new, strict=True):
            kept[:, :, past : self.n] = t
        return [kept[:, :, : self.n] for kept in self.kept]


class Embedding(nn.Embedding):
    """
    nn.Embedding, (B, T) -> (B, T, C), on a CPU by a gather: of nn.Embedding's own gradient torch.compile makes an atomic
    addition for every number there, which takes several times as long.
    """

    def forward(self, idx):
        if idx.device.type != "cpu":
            return super().forward(idx)
        return self.weight.gather(0, idx.flatten()[:, None].expand(-1, self.embedding_dim)).unflatten(0, idx.shape)


class GPT(nn.Module):
    """
    Token and position tables, the stack of blocks, a final LayerNorm and a head tied to the token table. Weights start
    as GPT-2's: normal with standard deviation 0.02, output projections with 0.02 / sqrt(2 n_layer), whatever n_loop.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        tables = dict(wte=config.vocab_size, wpe=config.block_size)
        if config.velocity_init == "embed":
            tables |= dict(vte=config.vocab_size, vpe=config.block_size)
        self.transformer = nn.ModuleDict({name: Embedding(n, config.n_embd) for name, n in tables.items()})
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(("attn.bias", "fc.bias", "proj.bias", "gate.bias")):
                nn.init.zeros_(p)

    def embed(self, idx, past=0):
        """The iterate and the velocity before the first layer, (B, T, C) each. Raises ValueError beyond block_size."""
        if past + idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{past + idx.size(1)} tokens are more than block_size={self.config.block_size}: pass the last ones"
            )
        t, here = self.transformer, slice(past, past + idx.size(1))
        x = t.drop(t.wte(idx) + t.wpe.weight[here])
        if self.config.velocity_init == "zero":
            return x, torch.zeros_like(x)
        v = t.drop(t.vte(idx) + t.vpe.weight[here])
        return (x + v if self.config.momentum == "none" else x), v  # EmbedControl: the same tables, and no velocity

    def layers(self):
        """The blocks in the order in which they are applied."""
        return [*self.transformer.h] * self.config.n_loop

    def hidden(self, idx, caches=None, past=0):
        """
        What the head reads: the iterate after the last layer, normalised, (B, T, C). caches, one for each of layers(), hold
        the `past` tokens before idx, which is then a single token.
        """
        assert past == 0 or idx.size(1) == 1
        x, v = self.embed(idx, past)
        if self.config.reversible and torch.is_grad_enabled():
            steps = [step for block in self.layers() for step in block.steps()]
            x = Reversible.apply(x, v, steps, *self.transformer.h.parameters())
        else:
            for i, block in enumerate(self.layers()):
                x, v = block(x, v, caches and caches[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, caches=None, past=0):
        """
        idx, targets: (B, T) int64; a target of -1 is not counted. Returns logits (B, T, vocab_size) and the mean
        cross entropy in nats per token, or without targets the logits of the last position, (B, 1, vocab_size), and
        None. caches and past are hidden()'s.
        """
        x = self.hidden(idx, caches, past)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None):
        """
        Append up to max_new_tokens to idx, (B, T) with T >= 1, sampled from softmax(logits / temperature) among the
        top_k likeliest (None: all); temperature 0 takes the likeliest. A row ends at its first `stop` token and is
        filled with it; all rows ended, generation ends. Tokens beyond block_size see the last block_size only, as in
        nanoGPT, and cost a whole forward pass each, since every position moves; those before reuse their keys.
        """
        block_size, caches = self.config.block_size, None
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        with torch.inference_mode():  # less overhead than no_grad, and a token is hundreds of tiny operations
            for _ in range(max_new_tokens):
                if idx.size(1) > block_size:
                    logits, _ = self(idx[:, -block_size:])
                elif caches is None:
                    caches = [Cache(block_size) for _ in self.layers()]
                    logits, _ = self(idx, caches=caches)
                else:
                    logits, _ = self(idx[:, -1:], caches=caches, past=idx.size(1) - 1)
                logits = logits[:, -1].float()
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                if temperature == 0:
                    token = logits.argmax(-1, keepdim=True)
                else:
                    token = torch.multinomial(F.softmax(logits / temperature, -1), 1)
                if stop is not None:
                    token = token.masked_fill(ended, stop)
                    ended |= token == stop
                idx = torch.cat((idx, token), 1)
                if stop is not None and ended.all():
                    break
        return idx.clone()  # an ordinary tensor again

    @torch.no_grad()
    def energies(self, idx):
        """
        What attention descends, layer by layer, for idx (B, T): dict of
            before, after   free energy of the queries before and after the step that attention moves (under Euler splitting
                            with the MLP), among the keys that it saw: (layers, nh), means over sequences and positions,
                            in units of q.k, for the linear energies of its square
            entropy         of the p_j that it summed with, in nats: (layers, nh); None for the linear energies
            attention       these p_j for the first sequence: (layers, nh, T, T); None likewise
        """
        x, v = self.embed(idx)
        rows = defaultdict(list)
        for block in self.layers():
            (rule, (attention, *mlp)), *others = block.steps()
            seen = []  # where the rule asks attention for a direction: at x, or ahead of it
            moved, v = rule(x, v, lambda y, A=attention, seen=seen: seen.append(y) or A(y), *mlp)
            context = block.ln_1(seen[0])
            for key, at in (("before", x), ("after", moved)):
                rows[key].append(block.attn.free_energy(block.ln_1(at), context)[0].mean((0, 2)))
            _, p = block.attn.free_energy(context, context)
            if p is not None:
                rows["entropy"].append(-torch.xlogy(p, p).sum(-1).mean((0, 2)))
                rows["attention"].append(p[0])
            x = moved
            for rule, oracles in others:
                x, v = rule(x, v, *oracles)
        return {key: torch.stack(rows[key]) if rows[key] else None for key in ("before", "after", "entropy", "attention")}

    def count_parameters(self):
        """Numbers of parameters: dict(embedding=..., layers=..., scalars=...); the tied head counts as embedding."""
        embedding = sum(p.numel() for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        scalars = sum(p.numel() for m in self.modules() if isinstance(m, Scalar) for p in m.parameters())
        total = sum(p.numel() for p in self.parameters())
        return dict(embedding=embedding, layers=total - embedding - scalars, scalars=scalars)

    def flops_per_token(self):
        """
        Multiplications and additions of a training step (forward and twice that backward) per token of a full context. Fused
        attention is counted with all keys, attention in chunks with those that it multiplies.
        """
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            idx = torch.zeros(1, self.config.block_size, dtype=torch.long)
            GPT(self.config)(idx, idx)
        return 3 * counter.get_total_flops() / self.config.block_size


def table():
    """The variants as a Markdown table, at GPT-2's size: parameters, and FLOPs of a training step per token."""
    rows = ["| variant | source | choices | embedding | layers | scalars | MFLOPs a token |", "|---|---|---|--:|--:|--:|--:|"]
    for name, row in VARIANTS.items():
        choices = " ".join(f"{k}={v!r}" if k == "learned" else f"{k}={v}" for k, v in row.items() if k != "source")
        with torch.device("meta"):
            model = GPT(GPTConfig(variant=name))
        counts = " | ".join(f"{n:,}" for n in model.count_parameters().values())
        rows.append(f"| `{name}` | {row['source']} | {choices} | {counts} | {model.flops_per_token() / 1e6:,.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
