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
    [Gai]    2605.24425   Momentum Streams
"""

import difflib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# ----------------------------------------------------------------------------------------------------------------------
# the choices

# The axes and their values; MHA takes the first of each.
AXES = dict(
    energy=("softmax", "linear", "gated_linear"),
    curvature=("none", "newton", "light"),
    momentum=("none", "polyak", "nesterov"),
    momentum_on=("attention", "both"),
    qk_norm=(False, True),
)

# A paper's name, and what it chooses differently from MHA.
VARIANTS = {
    "MHA": dict(),
    "MomenMHA": dict(momentum="polyak"),  # [Ren]
    "NagMHA": dict(momentum="nesterov", beta=0.9),  # [Ren]
    "MHA2nd1st": dict(curvature="newton"),  # [Ren], form derived
    "LightMHA2nd1st": dict(curvature="light"),  # [Ren], form derived
    "LinearMHA": dict(energy="linear"),  # [Ren]
    "GatedLinearMHA": dict(energy="gated_linear"),  # [Ren]
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
    energy: str | None = None  # what attention descends: softmax, linear, gated_linear
    curvature: str | None = None  # how its gradient is preconditioned: none, newton, light
    momentum: str | None = None  # how the iterate moves: none, polyak, nesterov
    momentum_on: str | None = None  # the sublayers that share the velocity: attention, both
    qk_norm: bool | None = None  # give all queries one norm and all keys one norm
    beta: float | None = None  # velocity kept from one step to the next, in (0, 1)
    eta: float | None = None  # length of the step along the velocity, positive
    learned: str | None = None  # scalars that each layer learns, such as "beta eta"; the others stay fixed

    def __post_init__(self):
        defaults = {axis: values[0] for axis, values in AXES.items()} | dict(beta=0.5, eta=1.0, learned="")
        for name, value in (defaults | VARIANTS.get(self.variant, {})).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    def problems(self):
        """What is wrong with this configuration: the value, the rule, the remedy."""
        near = difflib.get_close_matches(str(self.variant), VARIANTS, n=1, cutoff=0.4)
        moves = self.momentum != "none"
        # fmt: off
        rules = [
            (self.variant in VARIANTS, f"variant={self.variant!r} is none of {', '.join(VARIANTS)}"
             + (f"; did you mean {near[0]}?" if near else "")),
            *((getattr(self, axis) in values, f"{axis}={getattr(self, axis)!r} is none of {', '.join(map(str, values))}")
              for axis, values in AXES.items()),
            *((getattr(self, size) is None or getattr(self, size) > 0, f"{size}={getattr(self, size)} must be at least 1")
              for size in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")),
            (self.n_head < 1 or self.n_embd % self.n_head == 0,
             f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}"),
            (0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)"),
            (0 < self.beta < 1, f"beta={self.beta} must lie in (0, 1)"),
            (self.eta > 0, f"eta={self.eta} must be positive"),
            (set(self.learned.split()) <= {"beta", "eta"}, f"learned={self.learned!r} may name beta and eta"),
            (self.curvature == "none" or self.energy == "softmax",
             f"curvature={self.curvature} is derived for energy=softmax: with energy={self.energy} take curvature=none"),
            (moves or self.momentum_on == "attention", "momentum_on=both needs a velocity: take momentum=polyak or nesterov"),
            (moves or not self.learned, f"learned={self.learned!r} needs a velocity: take momentum=polyak or nesterov"),
        ]
        # fmt: on
        return [problem for holds, problem in rules if not holds]


# ----------------------------------------------------------------------------------------------------------------------
# energies and curvatures: q, k, v -> o, each (B, nh, T, hs). A position sees itself and those before it; a lone query
# is the last position, as in generation, and sees every key.


def softmax_attention(q, k, v, dropout=0.0):
    """
    A gradient step on the free energy F(q) = -T log sum_j exp(q.k_j / T), values free [Ren]:

        o = sum_j p_j v_j        p_j = softmax_j(q.k_j / T)        (v = k gives k̄ = -grad F)
    """
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1)


def newton_attention(q, k, v, tau, dropout=0.0):
    """
    MHA2nd1st [Ren; form derived]: a Newton step on the free energy of E_j = |q - k_j|^2 / 2, with its inverse Hessian
    (I - C/T)^-1, C = Cov_p(k), replaced by the Taylor polynomial I + C/T. This reweights attention:

        u = k̄ - q        s_j = (k_j - k̄).u / T        w_j = p_j (1 + tau s_j)        o = sum_j w_j v_j

    tau: (nh, 1, 1). tau = 0 is softmax attention; tau = 1, v = k and keys of one norm make it the exact Taylor step.
    """
    T = math.sqrt(q.size(3))
    p = (q @ k.mT / T).masked_fill(~causal(q, k), -math.inf).softmax(-1)  # (B, nh, T, T)
    kbar = p @ k
    u = kbar - q
    s = (u @ k.mT - (u * kbar).sum(-1, keepdim=True)) / T
    w = p * (1 + tau * s)
    return F.dropout(w, dropout) @ v


def light_attention(q, k, v, tau, dropout=0.0):
    """
    LightMHA2nd1st [Ren names it; form derived]: to first order 1 + tau s_j is exp(tau s_j), and p_j times an
    exponential is attention at a moved query: two fused calls and O(T) memory for MHA2nd1st to first order in tau.

        k̄ = A(q, K, K)        o = A(q + tau (k̄ - q), K, V)
    """
    kbar = softmax_attention(q, k, k)
    return softmax_attention(q + tau * (kbar - q), k, v, dropout)


def linear_attention(q, k, v, log_a, S=None, chunk=64):
    """
    A gradient step on sum_j a_{j+1} ... a_i E_j with E_j = -(q.k_j)^2 / 2, values free [Ren]; LinearMHA has a = 1:

        S_i = a_i S_{i-1} + k_i v_i^T        o_i = S_i^T q_i = sum_{j<=i} a_{j+1} ... a_i (q_i.k_j) v_j

    A matrix product within a chunk, the state S from chunk to chunk: O(T hs (hs + chunk)) in time.
    log_a: (B, nh, T), float32, <= 0. S: (B, nh, hs, hs), float32, after the tokens before q; None if there are none.
    Returns o and the S after the last token.
    """
    if S is None:
        S = log_a.new_zeros(*q.shape[:2], k.size(3), v.size(3))
    outputs = []
    for i in range(0, q.size(2), chunk):
        q_, k_, v_, log_a_ = (t[:, :, i : i + chunk] for t in (q, k, v, log_a))
        b = log_a_.cumsum(-1)  # log decay since the chunk began
        D = (b[..., :, None] - b[..., None, :]).masked_fill(~causal(q_, k_), -math.inf).exp()  # decay from j to i
        outputs.append((q_ @ k_.mT * D) @ v_ + (q_ * b.exp()[..., None]) @ S)
        S = b[..., -1:, None].exp() * S + (k_ * (b[..., -1:] - b).exp()[..., None]).mT @ v_
    return torch.cat(outputs, 2), S


def causal(q, k):
    """(queries, keys) bool: the keys that each query sees."""
    n, m = q.size(2), k.size(2)
    return torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)


# ----------------------------------------------------------------------------------------------------------------------
# oracles: x -> descent direction, both (B, T, C)


class Scalar(nn.Module):
    """A number kept in its range: a parameter seen through a map onto the range, or, if not learned, a constant."""

    MAPS = dict(  # range: (map, its inverse)
        real=(lambda a: a, lambda y: y),
        unit=(torch.sigmoid, torch.logit),  # (0, 1)
        positive=(F.softplus, lambda y: y + torch.log(-torch.expm1(-y))),  # (0, inf)
    )

    def __init__(self, value, range="real", shape=(), learned=True):
        super().__init__()
        self.value, (self.map, inverse) = value, self.MAPS[range]
        self.raw = nn.Parameter(inverse(torch.full(shape, value))) if learned else None

    def forward(self):
        return self.value if self.raw is None else self.map(self.raw)


class Attention(nn.Module):
    """Multi-head attention: a step on the config's energy, preconditioned by its curvature."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, nh = config.n_embd, config.n_head
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.curvature != "none":
            self.tau = Scalar(0.0, shape=(nh, 1, 1))  # starts as MHA
        if config.energy == "gated_linear":
            self.c_gate = nn.Linear(C, nh)
            # spreads the heads' memories: at first they forget half of what they saw in 1 to 280 tokens
            self.register_buffer("horizon", torch.linspace(0, 6, nh)[:, None], persistent=False)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.config.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=2))
        if self.config.qk_norm:
            q, k = F.rms_norm(q, q.shape[3:]), F.rms_norm(k, k.shape[3:])
        dropout = self.config.dropout if self.training else 0.0
        if self.config.energy == "softmax":
            if cache is not None:
                k, v = cache.extend(k, v)
            match self.config.curvature:
                case "none":
                    o = softmax_attention(q, k, v, dropout)
                case "newton":
                    o = newton_attention(q, k, v, self.tau(), dropout)
                case "light":
                    o = light_attention(q, k, v, self.tau(), dropout)
        else:
            o, S = linear_attention(q, k, v, self.log_gate(x), cache and cache.S)
            if cache is not None:
                cache.S = S
            o = F.rms_norm(o, o.shape[3:], eps=1e-5)  # a sum over the past, not a mean: keeps its scale
        return self.resid_dropout(self.c_proj(o.transpose(1, 2).reshape(B, T, C)))

    def log_gate(self, x):
        """log a: (B, nh, T), <= 0 by construction and in float32, where a sum over many tokens stays exact."""
        precise = torch.promote_types(x.dtype, torch.float32)
        if self.config.energy == "linear":
            return x.new_zeros(x.size(0), self.config.n_head, x.size(1), dtype=precise)
        return F.logsigmoid(self.c_gate(x).mT.to(precise) + self.horizon)


class MLP(nn.Module):
    """GPT-2's two-layer perceptron."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


# ----------------------------------------------------------------------------------------------------------------------
# update rules: x, v, oracle -> x, v


class Gradient(nn.Module):
    """x <- x + g(x), the residual connection; a velocity passes by unchanged."""

    def forward(self, x, v, oracle):
        return x + oracle(x), v


class Momentum(nn.Module):
    """
    A gradient step with a velocity v that runs through depth, zero before the first layer:

        polyak      v <- beta v + g(x);               x <- x + eta v        [Ren] MomenMHA
        nesterov    v <- beta v + g(x + eta beta v);  x <- x + eta v        [Ren] NagMHA
    """

    def __init__(self, config):
        super().__init__()
        self.look_ahead = config.momentum == "nesterov"
        self.beta = Scalar(config.beta, "unit", learned="beta" in config.learned.split())
        self.eta = Scalar(config.eta, "positive", learned="eta" in config.learned.split())

    def forward(self, x, v, oracle):
        beta, eta = self.beta(), self.eta()
        g = oracle(x + eta * beta * v if self.look_ahead else x)
        v = beta * v + g
        return x + eta * v, v


# ----------------------------------------------------------------------------------------------------------------------
# the model


class Block(nn.Module):
    """One layer: a step on attention, then a step on the MLP, each oracle behind its own LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        moves = config.momentum != "none"
        self.step_1 = Momentum(config) if moves else Gradient()
        self.step_2 = Momentum(config) if moves and config.momentum_on == "both" else Gradient()

    def forward(self, x, v, cache=None):
        x, v = self.step_1(x, v, lambda x: self.attn(self.ln_1(x), cache))
        x, v = self.step_2(x, v, lambda x: self.mlp(self.ln_2(x)))
        return x, v


class Cache:
    """What one attention remembers of the tokens before: their keys and values, or the state S of a linear energy."""

    def __init__(self, block_size):
        self.block_size, self.n, self.S = block_size, 0, None

    def extend(self, k, v):
        """Append k and v, (B, nh, t, hs), and return all that were appended."""
        if self.n == 0:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.block_size, t.size(3)) for t in (k, v))
        past, self.n = self.n, self.n + k.size(2)
        self.k[:, :, past : self.n], self.v[:, :, past : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith(("attn.bias", "fc.bias", "proj.bias", "gate.bias")):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, caches=None, past=0):
        """
        idx, targets: (B, T) int64; a target of -1 is not counted. Returns logits (B, T, vocab_size) and the mean
        cross entropy in nats per token, or without targets the logits of the last position, (B, 1, vocab_size), and
        None. caches, one for each block, hold the `past` tokens before idx.
        """
        pos = torch.arange(past, past + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        v = torch.zeros_like(x)
        for i, block in enumerate(self.transformer.h):
            x, v = block(x, v, caches and caches[i])
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None):
        """
        Append up to max_new_tokens to idx, (B, T) with T >= 1, sampled from softmax(logits / temperature) among the
        top_k likeliest (None: all); temperature 0 takes the likeliest. A row ends at its first `stop` token and is
        filled with it; all rows ended, generation ends. Tokens beyond block_size see the last block_size only, as in
        nanoGPT, and cost a whole forward pass each, since every position moves; those before reuse their keys.
        """
        block_size, caches = self.config.block_size, None
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:
                logits, _ = self(idx[:, -block_size:])
            elif caches is None:
                caches = [Cache(block_size) for _ in self.transformer.h]
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
            if ended.all():
                break
        return idx

    def count_parameters(self):
        """Numbers of parameters: dict(embedding=..., layers=..., scalars=...); the tied head counts as embedding."""
        embedding = sum(p.numel() for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        scalars = sum(p.numel() for m in self.modules() if isinstance(m, Scalar) for p in m.parameters())
        total = sum(p.numel() for p in self.parameters())
        return dict(embedding=embedding, layers=total - embedding - scalars, scalars=scalars)

    def flops_per_token(self):
        """Multiplications and additions of a training step (forward and twice that backward) per token of a full context."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            idx = torch.zeros(1, self.config.block_size, dtype=torch.long)
            GPT(self.config)(idx, idx)
        return 3 * counter.get_total_flops() / self.config.block_size
