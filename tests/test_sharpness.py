"""experiments.sharpness: its numbers against the explicit Hessian of a tiny model and against differences of gradients."""

import json

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import checkpoint
from conftest import save_run, save_tokens, tiny
from data import Split
from experiments import sharpness
from guard import UserError
from model import VARIANTS

VOCAB = 11


def small(*system, **choices):
    """A model far from its initialisation, where each parameter matters."""
    return tiny(*system, noise=0.3, **dict(n_embd=4, block_size=6, vocab_size=VOCAB) | choices)


def flat(model):
    return parameters_to_vector(model.parameters()).detach()


def batches(*sizes):
    rng = np.random.default_rng(0)
    return [tuple(torch.from_numpy(rng.integers(VOCAB, size=(2, n, 6)))) for n in sizes]


def differences(model, data, v, h=1e-6):
    """H v by central differences of the gradient of the loss on all windows at once."""
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    theta, gradients = flat(model), []
    for at in theta + h * v, theta - h * v, theta:
        vector_to_parameters(at, model.parameters())
        gradient = torch.autograd.grad(model(x, y)[1], list(model.parameters()), materialize_grads=True)
        gradients.append(parameters_to_vector(gradient))
    return (gradients[0] - gradients[1]) / (2 * h)


@pytest.fixture(scope="module")
def explicit():
    """
    A model of a few hundred parameters, its batches of unequal size, and its whole Hessian by differences of gradients.
    torch.func.hessian is no reference here: torch 2.13's forward-mode derivative of LayerNorm's backward pass is wrong.
    """
    model, data = small(n_layer=1).double(), batches(3, 2)
    H = torch.stack([differences(model, data, e) for e in torch.eye(len(flat(model)), dtype=torch.float64)])
    return model, data, (H + H.T) / 2


def test_products_are_those_of_the_explicit_hessian(explicit):
    model, data, H = explicit
    for v in torch.randn(3, len(H), dtype=torch.float64):
        torch.testing.assert_close(sharpness.hessian_product(model, data, v), H @ v, rtol=1e-6, atol=1e-6)


def test_the_trace_is_estimated_with_its_error(explicit):
    _, _, H = explicit
    probes, generator = 400, torch.Generator().manual_seed(1)
    mean, error = sharpness.trace(lambda v: H @ v, H[0], probes, generator)
    # random signs leave the variance of what lies off the diagonal
    expected = (2 * (H - H.diag().diag()).square().sum() / probes).sqrt().item()
    assert error == pytest.approx(expected, rel=0.15)
    assert abs(mean - H.trace().item()) < 3 * expected


def test_lanczos_finds_the_largest_eigenvalue(explicit):
    _, _, H = explicit
    top = torch.linalg.eigvalsh(H)[-1].item()
    for sign, expected in ((1, top), (-1, torch.linalg.eigvalsh(-H)[-1].item())):  # not the largest of absolute value
        found = sharpness.largest_eigenvalue(lambda v, s=sign: s * (H @ v), H[0], 120, torch.Generator().manual_seed(0))
        assert len(found) == 120 and found[-1] == pytest.approx(expected, rel=1e-9)
        assert all(b > a - 1e-9 for a, b in zip(found, found[1:], strict=False)) and found[0] < expected
    few = sharpness.largest_eigenvalue(lambda v: H.float() @ v, H[0].float(), 20, torch.Generator().manual_seed(0))
    assert few[-1] == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_products(variant):
    model, data = small(variant).double(), batches(2)
    v = torch.randn(len(flat(model)), dtype=torch.float64)
    expected = differences(model, data, v)
    assert (sharpness.hessian_product(model, data, v) - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture
def run(tmp_path):
    """A function that makes a run's folder with a checkpoint, and returns it."""
    (tmp_path / "text").mkdir()
    save_tokens(tmp_path / "text", VOCAB, train=200, val=200)

    def make(name, variant="MHA", seed=0, **choices):
        where = dict(data_dir=str(tmp_path), dataset="text", seed=seed)
        save_run(tmp_path / name, small(variant, seed, **choices), best=False, config=where)
        return tmp_path / name

    return make


def measure(*arguments, out):
    sharpness.main([*map(str, arguments), "--out", str(out), "--batches", "2", "--batch_size", "3", "--device", "cpu"])
    return json.loads((out.parent / f"{out.name}.json").read_text())


def rows(text):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ]


@pytest.mark.slow
def test_the_table(run, tmp_path, capsys):
    """Numbers of the saved weights on the windows that are named; systems with several seeds are summarised."""
    a, b, c = run("a"), run("b", seed=1), run("c", "NagMHA", beta=0.5, dropout=0.3, n_layer=1)
    records = measure(a, b, c, "--probes", "12", "--iterations", "24", out=tmp_path / "s")
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "s.md").read_text().strip()
    model, split = small("NagMHA", beta=0.5, dropout=0.3, n_layer=1), Split(tmp_path / "text", "train", 6)
    x, y = map(torch.from_numpy, split.windows(split.fixed(6)))
    loss = model(x, y)[1].item()
    H = torch.stack([sharpness.hessian_product(model, [(x, y)], e) for e in torch.eye(len(flat(model)))])
    assert records[2]["loss"] == pytest.approx(loss, rel=1e-5) and records[2]["tokens"] == x.numel()
    assert records[2]["trace"] == pytest.approx(H.trace().item(), abs=4 * records[2]["trace_error"])
    assert records[2]["trace_per_parameter"] == records[2]["trace"] / len(H)
    assert records[2]["eigenvalue"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-4)
    assert 0 <= records[2]["eigenvalue_change"] < 1e-4
    head, one, two, three, _, mha, nag = rows(text)
    assert three[:5] == [str(c), "NagMHA --beta=0.5 --n_layer=1 --dropout=0.3", "0", "7", f"{loss:.4f}"]
    assert one[1] == two[1] == "MHA --n_layer=2 --dropout=0.0"
    assert float(three[7]) == pytest.approx(records[2]["eigenvalue"], rel=1e-3)
    eigenvalues = np.array([r["eigenvalue"] for r in records[:2]])  # of a and b
    mean, sd = map(float, mha[6].split(" ± "))
    assert (mha[1:3], nag[1:3]) == (["2", "7"], ["1", "7"]) and "±" not in nag[6]
    assert mean == pytest.approx(eigenvalues.mean(), rel=1e-3) and sd == pytest.approx(
        eigenvalues.std(ddof=1), rel=5e-2
    )  # two digits


def test_runs_at_two_rates_are_two_systems(run, tmp_path, capsys):
    """And neither a knob that only one of them knows nor a resumed run makes more of them."""
    folders = [run(name, seed=seed) for seed, name in enumerate("abc")]
    for folder, knobs in zip(folders, ({}, dict(learning_rate=0.2), dict(learning_rate=0.2, init_from="resume")), strict=True):
        state = checkpoint.load(folder / "ckpt.pt")
        checkpoint.save(folder, state | dict(config=state["config"] | knobs), best=False)
    measure(*folders, "--probes", "2", "--iterations", "2", out=tmp_path / "s")
    *_, slow, fast = rows(capsys.readouterr().out)
    assert (slow[:2], fast[:2]) == (["MHA --learning_rate=0.0006", "1"], ["MHA --learning_rate=0.2", "2"])


def test_a_checkpoint_is_measured_once(run, tmp_path, monkeypatch, capsys):
    a, b = run("a"), run("b", "MomenMHA")
    few = ("--probes", "2", "--iterations", "3")
    first = measure(a, *few, out=tmp_path / "s")
    assert measure(a, *few, out=tmp_path / "again") == first
    for flags in ("--split", "val"), ("--seed", "1"):  # other settings, beside the first
        again, other = measure(a, *few, *flags, out=tmp_path / flags[0]), measure(a, *few, out=tmp_path / flags[0])
        assert other == again + first and again[0]["trace"] != first[0]["trace"]
        assert (again[0]["loss"] == first[0]["loss"]) == (flags[0] == "--seed")

    both = measure(a, b, *few, out=tmp_path / "s")
    assert both[:1] == first and len(both) == 2
    monkeypatch.setattr(sharpness, "hessian_product", None)
    capsys.readouterr()
    assert measure(b, a, *few, out=tmp_path / "s") == both
    assert [row[0] for row in rows(capsys.readouterr().out)[1:]] == [str(b), str(a)]
    (tmp_path / "other" / "text").mkdir(parents=True)
    save_tokens(tmp_path / "other" / "text", VOCAB, val=200, train=200)
    with pytest.raises(TypeError):  # other text
        measure(a, *few, "--data_dir", tmp_path / "other", out=tmp_path / "s")
    checkpoint.save(a, checkpoint.load(b / "ckpt.pt"), best=False)  # another checkpoint at its place
    with pytest.raises(TypeError):
        measure(a, *few, out=tmp_path / "s")


def test_what_does_not_fit_is_said(run, tmp_path):
    a = run("a")
    for flag, least in dict(batches=1, probes=2, iterations=2).items():
        with pytest.raises(UserError, match=f"--{flag} {least - 1} must be at least {least}"):
            sharpness.main([str(a), f"--{flag}", str(least - 1)])
    with pytest.raises(UserError, match="no checkpoint at"):
        measure(tmp_path / "none", out=tmp_path / "s")
    with pytest.raises(UserError, match="no finished data set"):
        measure(a, "--data_dir", tmp_path / "a", out=tmp_path / "s")
    state = checkpoint.load(a / "ckpt.pt")
    checkpoint.save(a, {k: v for k, v in state.items() if k != "config"}, best=False)
    with pytest.raises(UserError, match="trained on"):
        measure(a, out=tmp_path / "s")
    other = run("other", vocab_size=VOCAB - 1)
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB}, the model one of {VOCAB - 1}"):
        measure(other, out=tmp_path / "s")
    checkpoint.save(a, state | dict(tokenizer="gpt2"), best=False)
    with pytest.raises(UserError, match="has the tokenizer bytes, the checkpoint has gpt2: change --data_dir"):
        measure(a, out=tmp_path / "s")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="choose another --out"):
        measure(a, out=tmp_path / "broken")
    checkpoint.save(a, state, best=False)
    with pytest.raises(UserError, match="cannot write"):
        measure(a, "--probes", 2, "--iterations", 2, out=tmp_path / "text" / "meta.json" / "s")
