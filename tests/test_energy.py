"""experiments.energy on untrained models: what it prints is what energies() computes, and it draws something."""

import math

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from conftest import save_run, save_tokens, tiny
from data import Split, fingerprint, read_meta
from experiments import energy
from guard import UserError
from test_model import by_query, cem_energy, huber_energy, inner_product_energy, tokens
from test_model import tiny as noisy


@pytest.fixture
def run(tmp_path):
    """A function that makes a run's folder with a checkpoint of the variant, and returns it with its model."""
    save_tokens(tmp_path, val=1000)

    def make(variant):
        model = tiny(variant, block_size=16)
        save_run(tmp_path, model, config=dict(data_dir=str(tmp_path.parent), dataset=tmp_path.name))
        return tmp_path, model

    return make


@pytest.mark.parametrize(
    "variant, layers, names", [("CEM+", 2, {"attn.a", "attn.eta"}), ("LinearMHA", 2, set()), ("LoopNagMHA", 8, set())]
)
def test_the_table_is_what_the_model_computes(run, capsys, variant, layers, names):
    folder, model = run(variant)
    energy.main([str(folder), "--out", str(folder / "energy.png"), "--sequences", "3"])
    *rows, png = capsys.readouterr().out.splitlines()[1:]
    assert png == str(folder / "energy.png") and (folder / "energy.png").read_bytes().startswith(b"\x89PNG")
    text = Split(folder, "val", 16)
    expected = energy.energies(model, torch.from_numpy(text.windows(text.fixed(3))[0]))
    assert len(rows) == layers
    for layer, row in enumerate(rows):
        number, before, after, change, entropy = row.split()
        b, a = (expected[key][layer].mean().item() for key in ("before", "after"))
        assert [int(number), float(before), float(after), float(change)] == pytest.approx([layer, b, a, a - b], abs=1e-4)
        if expected["entropy"] is None:
            assert entropy == "-"
        else:
            assert float(entropy) == pytest.approx(expected["entropy"][layer].mean().item(), abs=1e-4)
    assert names <= set(energy.scalars(model))


def test_other_text_is_named(run, capsys):
    folder, model = run("MHA")
    where = dict(data_dir=str(folder.parent), dataset=folder.name)
    for text, named in ((fingerprint(read_meta(folder)), False), ("other", True)):
        save_run(folder, model, config=where, data=text)
        energy.main([str(folder), "--out", str(folder / "energy.png")])
        assert ("is not the text that the checkpoint was trained on" in capsys.readouterr().err) == named


def test_what_does_not_fit_is_said(run):
    folder, _ = run("MHA")
    with pytest.raises(UserError, match="at least 1"):
        energy.main([str(folder), "--sequences", "0"])
    with pytest.raises(UserError, match="cannot write"):
        energy.main([str(folder), "--out", str(folder / "missing" / "energy.png")])
    state = checkpoint.load(folder / "best.pt")
    state["model_config"]["n_embd"] = 32
    checkpoint.save(folder, state, best=True)
    with pytest.raises(UserError, match="does not fit"):
        energy.main([str(folder)])
    save_run(folder, tiny("MHA", block_size=16))  # as nanoGPT's, without train.py's configuration
    with pytest.raises(UserError, match="does not say what it was trained on"):
        energy.main([str(folder)])
    with pytest.raises(UserError, match="no checkpoint"):
        energy.main([str(folder), "--ckpt", "none.pt"])


def test_reported_free_energies_are_those_of_the_definitions():
    """Means over sequences and positions of the energies of test_model.py; and where attention is asked ahead of x."""
    definitions = dict(
        MHA=inner_product_energy, NagMHA=inner_product_energy, HuberMHA=lambda q, k: huber_energy(q, k, math.sqrt(8)),
        LinearMHA=lambda q, k: -0.5 * (k @ q).square().sum(),
    )  # fmt: skip
    for variant, definition in definitions.items():
        model = noisy(variant, n_layer=1)
        block, idx = model.transformer.h[0], tokens(model)
        x, v = model.embed(idx)
        (rule, oracles), _ = block.steps()
        moved, _ = rule(x, v, *oracles)
        (q, k, _), (q_moved, _, _) = block.attn.qkv(block.ln_1(x)), block.attn.qkv(block.ln_1(moved))
        found = energy.energies(model, idx)
        for key, queries in (("before", q), ("after", q_moved)):
            torch.testing.assert_close(found[key][0], by_query(definition, queries, k).mean((0, 2)), rtol=1e-4, atol=1e-4)
        if variant == "LinearMHA":
            assert found["entropy"] is found["attention"] is None
        else:
            p = found["attention"][0]
            torch.testing.assert_close(p.sum(-1), torch.ones(2, 12))
            assert p.triu(1).sum() == 0
    ahead = noisy("NagMHA")
    inputs = []
    for block in ahead.transformer.h:
        block.attn.register_forward_pre_hook(lambda attn, args: inputs.append(args[0]))
    ahead(idx)
    found = energy.energies(ahead, idx)
    for block, read, p, entropy in zip(ahead.transformer.h, inputs[:3], found["attention"], found["entropy"], strict=True):
        q, k, _ = block.attn.qkv(read)  # what attention read in a forward pass, ahead of x
        used = by_query(lambda q, k: F.pad((k @ q / math.sqrt(8)).softmax(0), (0, 12 - len(k))), q[:1], k[:1])
        torch.testing.assert_close(p, used[0])
        used = by_query(lambda q, k: torch.distributions.Categorical(logits=k @ q / math.sqrt(8)).entropy(), q, k)
        torch.testing.assert_close(entropy, used.mean((0, 2)))
    x, _ = (cem := noisy("CEM", n_layer=1, bias=False)).embed(idx)
    block = cem.transformer.h[0]
    x = block.ln_1(x)
    want = torch.stack([torch.stack([cem_energy(block.attn, row[i], row, i) for i in range(12)]) for row in x]).mean()
    torch.testing.assert_close(energy.energies(cem, idx)["before"].sum(), want)


def test_a_temperature_is_in_the_energy():
    """F = -T log sum_j exp(q.k_j / T), with a T for each head, and with the q and k of the same weights at temperature 1."""
    attn = tiny(n_layer=1, learned="temperature").transformer.h[0].attn
    attn.temperature.raw.data = torch.tensor([0.3, 2.0])[:, None, None]
    plain = tiny(n_layer=1).transformer.h[0].attn
    plain.load_state_dict(attn.state_dict(), strict=False)
    x = 5 * torch.randn(2, 7, 16)
    q, k, _ = plain.qkv(x)
    for h, T in enumerate(math.sqrt(8) * F.softplus(torch.tensor([0.3, 2.0]))):
        expected = by_query(lambda q, k, T=T: -T * torch.logsumexp(k @ q / T, 0), q[:, h : h + 1], k[:, h : h + 1])
        torch.testing.assert_close(energy.free_energy(attn, x, x)[0][:, h], expected[:, 0], rtol=1e-4, atol=1e-4)


def test_an_energy_without_a_free_energy_is_an_error():
    model = tiny()
    model.config.energy = "another"
    with pytest.raises(UserError, match="does not know the free energy of energy=another"):
        energy.energies(model, torch.zeros(1, 5, dtype=torch.long))


def test_the_gated_energy_is_that_of_its_state():
    """F_i(q) = -q.M_i q / 2 where M_i = a_i M_{i-1} + k_i k_i^T, as the attention's own state forgets."""
    attn = noisy("GatedLinearMHA").transformer.h[0].attn
    x = torch.randn(2, 7, 16)
    q, k, _ = attn.qkv(x)
    M, expected = torch.zeros(2, 2, 8, 8), []
    for i, a in enumerate(attn.log_a(x).exp().unbind(2)):
        M = a[..., None, None] * M + k[:, :, i, :, None] * k[:, :, i, None, :]
        expected.append(-torch.einsum("bhd,bhde,bhe->bh", q[:, :, i], M, q[:, :, i]) / 2)
    torch.testing.assert_close(energy.free_energy(attn, x, x)[0], torch.stack(expected, 2))
