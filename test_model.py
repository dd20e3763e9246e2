"""The mathematics of model.py, against autograd of the energies, naive recurrences and another library."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap

from model import (
    GPT,
    VARIANTS,
    GPTConfig,
    Momentum,
    Scalar,
    light_attention,
    linear_attention,
    newton_attention,
    softmax_attention,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant="MHA", **choices):
    sizes = dict(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=31) | choices
    torch.manual_seed(0)
    model = GPT(GPTConfig(variant=variant, **sizes)).eval()
    with torch.no_grad():  # away from the initialisation, where many terms vanish
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(model, B=2, T=None, seed=1):
    shape = (B, T or model.config.block_size)
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def heads(T=9, hs=5, one_norm=False):
    """Random q, k, v: (2, 3, T, hs) float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, hs, dtype=torch.float64, generator=g) for _ in range(3))
    return q, F.rms_norm(k, (hs,)) if one_norm else k, v


def by_query(f, q, *others):
    """f(one query, the others up to its position), for every query: the definition of causal attention."""
    rows = [vmap(vmap(f))(q[:, :, i], *(t[:, :, : i + 1] for t in others)) for i in range(q.size(2))]
    return torch.stack(rows, 2)


def inner_product_energy(q, k):
    T = math.sqrt(len(q))
    return -T * torch.logsumexp(k @ q / T, 0)


def elastic_energy(q, k):
    T = math.sqrt(len(q))
    return -T * torch.logsumexp(-0.5 * (q - k).square().sum(-1) / T, 0)


# ---------------------------------------------------------------------------------------------------------------------
# energies and curvatures


def test_softmax_attention_is_a_gradient_step():
    q, k, _ = heads()
    torch.testing.assert_close(softmax_attention(q, k, k), -by_query(grad(inner_product_energy), q, k))


def test_with_keys_of_one_norm_both_energies_have_one_gradient():
    q, k, _ = heads(one_norm=True)
    torch.testing.assert_close(softmax_attention(q, k, k) - q, -by_query(grad(elastic_energy), q, k))


def test_newton_at_tau_1_is_the_taylor_newton_step():
    """(I + C/T) u = (2I - H) u, with gradient and Hessian of the elastic energy from autograd."""
    q, k, _ = heads(one_norm=True)
    u, H = -by_query(grad(elastic_energy), q, k), by_query(hessian(elastic_energy), q, k)
    step = 2 * u - (H @ u[..., None])[..., 0]
    torch.testing.assert_close(newton_attention(q, k, k, tau=1.0) - q, step)


def test_newton_correction_is_the_derivative_of_attention_along_u():
    q, k, v = heads()
    u = softmax_attention(q, k, k) - q
    o, tangent = jvp(lambda q: by_query(lambda q, k, v: (k @ q / math.sqrt(len(q))).softmax(0) @ v, q, k, v), (q,), (u,))
    torch.testing.assert_close(newton_attention(q, k, v, tau=0.7), o + 0.7 * tangent)


def test_light_agrees_with_newton_to_first_order_in_tau_and_not_to_second():
    q, k, v = heads()
    gap = [(light_attention(q, k, v, tau) - newton_attention(q, k, v, tau)).norm().item() for tau in (0, 1e-3, 2e-3)]
    assert gap[0] < 1e-14 < gap[1]
    assert gap[2] / gap[1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("chunk", [1, 4, 9, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_linear_attention_equals_its_recurrence(gated, chunk):
    """Outputs, last state and every gradient, from a state that earlier tokens left."""
    q, k, v = heads()
    log_a = F.logsigmoid(torch.randn(q.shape[:3], dtype=torch.float64)) * gated
    inputs = [t.requires_grad_() for t in (q, k, v, log_a, torch.randn(2, 3, 5, 5, dtype=torch.float64))]

    def recurrence(q, k, v, log_a, S):
        o = []
        for i in range(q.size(2)):
            S = log_a[:, :, i, None, None].exp() * S + k[:, :, i, :, None] * v[:, :, i, None, :]
            o.append((q[:, :, i, None] @ S)[:, :, 0])
        return torch.stack(o, 2), S

    results = [f(*inputs) for f in (recurrence, lambda *a: linear_attention(*a, chunk=chunk))]
    grads = [torch.autograd.grad(o.sin().sum() + S.cos().sum(), inputs) for o, S in results]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_linear_attention_with_tied_values_is_a_gradient_step():
    q, k, _ = heads()
    energy = grad(lambda q, k: -0.5 * (k @ q).square().sum())
    o, _ = linear_attention(q, k, k, torch.zeros(q.shape[:3], dtype=torch.float64))
    torch.testing.assert_close(o, -by_query(energy, q, k))


# ---------------------------------------------------------------------------------------------------------------------
# update rules


def test_momentum_rules_follow_their_equations():
    """Two steps of each rule on a quadratic, against numbers worked by hand: g(x) = -x from x = 1, beta 1/2, eta 1/4."""
    expected = dict(polyak=[(0.75, -1.0), (0.4375, -1.25)], nesterov=[(0.75, -1.0), (0.46875, -1.125)])
    for momentum, steps in expected.items():
        rule = Momentum(GPTConfig(variant="MHA", momentum=momentum, beta=0.5, eta=0.25))
        x, v = torch.tensor(1.0), torch.tensor(0.0)
        for want in steps:
            x, v = rule(x, v, lambda x: -x)
            assert (x.item(), v.item()) == want


@pytest.mark.parametrize("variant", ["MomenMHA", "NagMHA"])
def test_model_applies_the_rule_to_its_own_oracles(variant):
    """A forward pass written out with the equations of [Ren] and the model's sublayers."""
    model = tiny(variant, beta=0.6, eta=0.8)
    idx, t = tokens(model), model.transformer
    x = t.wte(idx) + t.wpe(torch.arange(idx.size(1)))
    p = 0
    for b in t.h:
        p = 0.6 * p + b.attn(b.ln_1(x + 0.8 * 0.6 * p if variant == "NagMHA" else x))
        x = x + 0.8 * p
        x = x + b.mlp(b.ln_2(x))
    torch.testing.assert_close(model(idx, idx)[0], model.lm_head(t.ln_f(x)))


def test_momenmha_unrolls_to_a_densenet():
    """Without MLPs x_L = x_0 + sum_l c_l g_l, c_l = eta sum_{m=l}^{L-1} beta^(m-l): the implicit skip connections."""
    model = tiny("MomenMHA", n_layer=5, beta=0.7, eta=0.9)
    g, ends = [], []
    for b in model.transformer.h:
        b.mlp.c_proj.weight.data.zero_()
        b.mlp.c_proj.bias.data.zero_()
        b.attn.register_forward_hook(lambda *a: g.append(a[-1]))
    model.transformer.h[0].ln_1.register_forward_pre_hook(lambda m, a: ends.append(a[0]))
    model.transformer.ln_f.register_forward_pre_hook(lambda m, a: ends.append(a[0]))
    model(tokens(model))
    c = [0.9 * sum(0.7 ** (m - layer) for m in range(layer, 5)) for layer in range(5)]
    torch.testing.assert_close(ends[1], ends[0] + sum(c * g for c, g in zip(c, g, strict=True)))


@pytest.mark.parametrize("choice", [dict(curvature="newton"), dict(curvature="light"), dict(momentum="polyak", beta=1e-9),
                                    dict(momentum="nesterov", beta=1e-9)], ids=str)  # fmt: skip
def test_without_correction_or_velocity_a_variant_is_mha(choice):
    mha, model = tiny(), GPT(GPTConfig(**(vars(tiny().config) | choice))).eval()
    model.load_state_dict(mha.state_dict(), strict=False)
    idx = tokens(mha)
    torch.testing.assert_close(model(idx, idx)[0], mha(idx, idx)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("range, values", [("real", (-3.0, 0.0)), ("unit", (0.01, 0.9)), ("positive", (1e-3, 1.0, 30.0))])
def test_scalars_start_at_their_value_and_stay_in_range(range, values):
    for value in values:
        scalar = Scalar(value, range)
        assert scalar().item() == pytest.approx(value, rel=1e-4)
        scalar.raw.data -= 50.0
        assert range == "real" or 0 <= scalar() < 1


def test_learned_scalars_are_parameters_and_fixed_ones_are_not():
    assert GPT(tiny("NagMHA").config).count_parameters()["scalars"] == 0
    model = tiny("NagMHA", learned="beta eta")
    assert model.count_parameters()["scalars"] == 2 * 3
    model(tokens(model), tokens(model))[1].backward()
    scalars = [m for m in model.modules() if isinstance(m, Scalar)]
    assert all(m.raw.grad for m in scalars[2:])  # in the first layer beta scales a velocity of zero


# ---------------------------------------------------------------------------------------------------------------------
# the whole model


def test_mha_is_gpt2():
    """Another library's GPT-2 with the same weights gives the same logits and loss."""
    transformers = pytest.importorskip("transformers")
    model = tiny(n_layer=2)
    c = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                n_head=c.n_head, activation_function="gelu")
    ).eval()  # fmt: skip
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed
    theirs.load_state_dict({k: v.t() if k.endswith(conv1d) else v for k, v in model.state_dict().items()})
    idx = tokens(model)
    logits, loss = model(idx, idx)
    torch.testing.assert_close(logits, theirs(idx).logits)
    shifted = model(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(shifted, theirs(idx, labels=idx).loss)


def test_mha_has_nanogpts_names_and_sizes():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=10, bias=False))
    layer = ["ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight", "ln_2.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    names = ["wte.weight", "wpe.weight", *(f"h.0.{name}" for name in layer), "ln_f.weight"]
    assert list(model.state_dict()) == [f"transformer.{name}" for name in names] + ["lm_head.weight"]
    with torch.device("meta"):
        assert sum(GPT(GPTConfig()).count_parameters().values()) == 124_475_904  # GPT-2's 124,439,808 and 47 padding rows


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=300, block_size=64, variant="GatedLinearMHA"))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02 / 4 if "c_proj" in name else 0.02, rel=0.1), name
        else:
            assert torch.equal(p, torch.full_like(p, float(".ln_" in name and name.endswith("weight")))), name


@every_variant
@pytest.mark.parametrize("T", [1, 7, 12])
def test_each_position_depends_on_itself_and_the_past_only(variant, T):
    """By the gradient of each position's logits in the embeddings: NaN-free, zero after it and not before."""
    model, idx = tiny(variant), None
    idx = tokens(model, B=1, T=T)
    embedding = model.transformer.wte(idx).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *a: embedding)
    logits, _ = model(idx, idx)
    for i in range(T):
        (g,) = torch.autograd.grad(logits[0, i].sin().sum(), embedding, retain_graph=True)
        depends = g[0].abs().sum(-1) > 0
        assert torch.isfinite(g).all() and depends.tolist() == [j <= i for j in range(T)]


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_learns(variant, dtype):
    model = tiny(variant, dropout=0.1).train()
    idx = tokens(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    assert logits.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@every_variant
def test_dropout_and_eval_mode(variant):
    model = tiny(variant, dropout=0.5)
    idx = tokens(model)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# loss of a step and the loss after it: they may change only with the mathematics or the initialisation, on purpose
GOLDEN = {
    "MHA": (3.908, 3.6609, 3.5005),
    "MomenMHA": (3.9072, 3.6802, 3.5077),
    "NagMHA": (3.9064, 3.6868, 3.5246),
    "MHA2nd1st": (3.908, 3.6609, 3.5005),
    "LightMHA2nd1st": (3.908, 3.6609, 3.5005),
    "LinearMHA": (3.9168, 3.822, 3.7619),
    "GatedLinearMHA": (3.8838, 3.8352, 3.7458),
}


@every_variant
def test_golden_training_step(variant):
    torch.manual_seed(0)
    model = GPT(GPTConfig(variant=variant, n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50))
    idx = tokens(model, B=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(idx, idx.roll(-1, 1))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[variant], abs=5e-4)


# ---------------------------------------------------------------------------------------------------------------------
# generation


@every_variant
def test_cached_text_is_uncached_text(variant):
    """Greedy continuation past block_size, against a full forward pass for each token."""
    model = tiny(variant)
    idx = tokens(model, T=3)
    cached = model.generate(idx, 14, temperature=0)
    for _ in range(14):
        idx = torch.cat((idx, model(idx[:, -12:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, idx)


def test_generate_options():
    model = tiny()
    idx = tokens(model, T=2)
    greedy = model.generate(idx, 8, temperature=0)
    assert torch.equal(model.generate(idx, 8, temperature=1.7, top_k=1), greedy)
    torch.manual_seed(3)
    free = model.generate(idx, 8)
    torch.manual_seed(3)
    assert torch.equal(model.generate(idx, 8, top_k=1000), free)
    stop = greedy[0, 3].item()
    stopped = model.generate(idx, 8, temperature=0, stop=stop)
    n = stopped.size(1)
    for row, whole in zip(stopped.tolist(), greedy.tolist(), strict=True):
        end = whole.index(stop, 2) + 1 if stop in whole[2:] else len(whole)
        assert row == (whole[:end] + [stop] * n)[:n]
    assert stop not in greedy[1, 2:] or n < 10


# ---------------------------------------------------------------------------------------------------------------------
# configurations


@pytest.mark.parametrize(
    "choices, words",
    [
        (dict(variant="NagMH"), "did you mean NagMHA"),
        (dict(n_embd=30, n_head=4), "multiple of n_head=4"),
        (dict(energy="linear", curvature="light"), "curvature=none"),
        (dict(momentum_on="both"), "needs a velocity"),
        (dict(learned="beta"), "needs a velocity"),
        (dict(momentum="polyak", learned="tau"), "may name"),
        (dict(beta=1.0), "(0, 1)"),
        (dict(eta=0.0), "positive"),
        (dict(dropout=1.0), "[0, 1)"),
        (dict(energy="cubic"), "none of softmax"),
        (dict(n_layer=0), "at least 1"),
    ],
    ids=str,
)
def test_senseless_configurations_are_refused(choices, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        GPTConfig(**choices)


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError) as error:
        GPTConfig(n_embd=30, n_head=4, beta=2.0, dropout=-1.0)
    assert len(str(error.value).splitlines()) == 3


def test_an_override_replaces_one_choice_of_a_variant():
    config = GPTConfig(variant="NagMHA", curvature="light")
    assert (config.momentum, config.curvature, config.beta) == ("nesterov", "light", 0.9)
