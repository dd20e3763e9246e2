"""experiments.toy: the problems against independent solutions, the model against GPT.forward and autograd, and whole runs."""

import argparse
import json

import numpy as np
import pytest
import torch

import prepare
from experiments import toy
from guard import UserError
from model import VARIANTS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare.main(["lis", "--documents", "3000", "--out", str(folder)])
    return folder


def arguments(data, **knobs):
    return argparse.Namespace(**dict(steps=10, n_embd=16, learning_rate=1e-2, no_mlp=False, data_dir=str(data)) | knobs)


def test_noiseless_regression_is_solved_by_least_squares(monkeypatch):
    monkeypatch.setattr(toy, "NOISE", 1e-4)
    x, y = (t.double() for t in toy.Regression(None, "cpu").examples(2000, seed=3))
    w = torch.linalg.lstsq(x, y).solution
    assert (x @ w - y).abs().max() < 1e-3  # one w for all examples of a sequence
    assert y.var().item() == pytest.approx(1, rel=0.1) and not w[0].allclose(w[1])
    # exact, once there are as many examples as unknowns, unless a sequence is nearly degenerate
    errors = toy.Regression(None, "cpu").posterior(x, y)
    assert errors[0] == pytest.approx(y[:, 0].square().mean().item()) and errors[-1] < 1e-6
    assert (errors[: toy.Regression.D] > 0.05).all()


def test_the_posterior_of_linear_regression_is_a_librarys_ridge():
    Ridge = pytest.importorskip("sklearn.linear_model").Ridge
    problem = toy.Regression(None, "cpu")
    x, y = (t.double() for t in problem.examples(40, seed=0))
    fits = [Ridge(alpha=problem.D * toy.NOISE**2, fit_intercept=False).fit(a[:5], b[:5]).predict(a[5:6]) for a, b in
            zip(x.numpy(), y.squeeze(2).numpy(), strict=True)]  # fmt: skip
    expected = ((np.concatenate(fits) - y[:, 5, 0].numpy()) ** 2).mean()
    assert problem.posterior(x, y)[5].item() == pytest.approx(expected, rel=1e-9)


def test_the_posterior_of_a_gaussian_process_is_that_of_a_library():
    """And its draws have the kernel's covariance."""
    library = pytest.importorskip("sklearn.gaussian_process")
    problem = toy.GaussianProcess(None, "cpu")
    x, y = (t.double() for t in problem.examples(8, seed=0))
    regressor = library.GaussianProcessRegressor(library.kernels.RBF(problem.D**0.5), alpha=toy.NOISE**2, optimizer=None)
    for i in (1, 10, 31):
        means = [regressor.fit(a[:i], b[:i]).predict(a[i : i + 1]).item() for a, b in zip(x.numpy(), y.numpy(), strict=True)]
        expected = ((np.array(means) - y[:, i, 0].numpy()) ** 2).mean()
        assert problem.posterior(x, y)[i].item() == pytest.approx(expected, rel=1e-6)
    draws = problem.values(x[:1].float().expand(4000, -1, -1), torch.Generator().manual_seed(0))[..., 0]
    torch.testing.assert_close(draws.T.cov().double(), problem.kernel(x[:1])[0], rtol=0, atol=0.1)
    assert problem.reference == pytest.approx(problem.posterior(*problem.held_out).mean().item() ** 0.5)


def test_a_regression_sees_the_examples_before(data):
    """An error depends on its own and earlier examples alone, and on its own y only as the target."""
    args = arguments(data)
    problem = toy.Regression(None, "cpu")
    model = toy.build(problem, toy.configure("MHA", args, 1), True, "cpu").eval()
    x, y = problem.examples(2, seed=0)
    moved_x, moved_y = x.clone(), y.clone()
    moved_x[:, 3] += 1
    moved_y[:, 3] += 1
    before, by_x, by_y = (problem.errors(model, *xy).detach() for xy in ((x, y), (moved_x, y), (x, moved_y)))
    assert before.shape == (2, problem.EXAMPLES)
    for after in by_x, by_y:
        assert torch.equal(after[:, :3], before[:, :3]) and (after[:, 3:] != before[:, 3:]).all()
    # what y adds to its own error is that of the target alone
    prediction = y[:, 3, 0] - before[:, 3].sqrt(), y[:, 3, 0] + before[:, 3].sqrt()
    assert all(any(abs((y[i, 3, 0] + 1 - p[i]) ** 2 - by_y[i, 3]) < 1e-4 for p in prediction) for i in range(2))


@pytest.mark.parametrize("problem", toy.PROBLEMS.values())
def test_batches_are_a_function_of_seed_and_step(data, problem):
    a, b = problem(data, "cpu"), problem(data, "cpu")
    a.batch(1, 0)
    assert all(map(torch.equal, a.batch(1, 3), b.batch(1, 3)))
    assert not any(map(torch.equal, a.batch(1, 3), a.batch(1, 4))) and not any(map(torch.equal, a.batch(1, 3), a.batch(2, 3)))


def test_lengths_are_those_of_a_quadratic_recurrence(data):
    """In text that is taken apart by splitting strings."""
    x, y = toy.LIS(data, "cpu").held_out
    asked = toy.lengths(x, y)
    assert len(x) > 20
    for inputs, targets, mask in zip(x.tolist(), y.tolist(), asked.tolist(), strict=True):
        whole = "".join("\0" if t == 256 else chr(t) for t in [inputs[0], *targets])
        documents, expected, at = whole.split("\0"), set(), 0
        for n, document in enumerate(documents):
            if n > 0 and "=" in document:
                digits, answers = document.split(" =")
                digits, best = [int(d) for d in digits.split()], []
                for i, d in enumerate(digits):
                    best.append(1 + max((best[j] for j in range(i) if digits[j] < d), default=0))
                best = [max(best[: i + 1]) for i in range(len(best))]
                assert "".join(f" {b}" for b in best).startswith(answers.rstrip("\n"))
                start = at + document.index("=")
                expected |= {start + i for i, c in enumerate(document[document.index("=") :]) if c.isdigit()}
            at += len(document) + 1
        assert {i + 1 for i, asks in enumerate(mask) if asks} == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_vectors(data, variant):
    args = arguments(data)
    problem = toy.Regression(None, "cpu")
    model = toy.build(problem, toy.configure(variant, args, 1), True, "cpu")
    problem.training_loss(model, *problem.batch(1, 0)).backward()
    read_in = model.transformer.wte.weight
    assert read_in.shape == (16, problem.D + 1) and (read_in.grad != 0).any(0).all() and model.lm_head.weight.shape == (1, 16)


def test_gradient_norms_are_autograds(data, monkeypatch):
    """Those of a run whose rate is nearly 0, against torch.func on the same weights and batches."""
    monkeypatch.setattr(toy, "SEQUENCES", 4)
    args = arguments(data, steps=10, learning_rate=1e-12)
    problem, cfg = toy.Regression(None, "cpu"), toy.configure("MomenMHA", args, 2)
    record = toy.train(problem, cfg, args, "cpu")
    model = toy.build(problem, cfg, True, "cpu")
    expected = np.zeros(4)
    for step in range(10):

        def loss(attention, step=step):
            x, y = problem.batch(2, step)
            tokens = torch.zeros(len(x), 2 * problem.EXAMPLES, problem.D + 1)
            tokens[:, ::2, : problem.D], tokens[:, 1::2, problem.D :] = x, y
            iterate, v = model.transformer.wte(tokens) + model.transformer.wpe.weight, torch.zeros(())
            for block, parameters in zip(model.transformer.h, attention, strict=True):
                v = 0.5 * v + torch.func.functional_call(block.attn, parameters, block.ln_1(iterate))
                iterate = iterate + v
                iterate = iterate + block.mlp(block.ln_2(iterate))
            return (model.lm_head(model.transformer.ln_f(iterate))[:, ::2] - y).square().mean()

        gradients = torch.func.grad(loss)([dict(b.attn.named_parameters()) for b in model.transformer.h])
        expected += [torch.cat([g.flatten() for g in layer.values()]).norm().item() / 10 for layer in gradients]
    assert record["gradient_norms"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_without_mlps_attention_is_all(data):
    args = arguments(data)
    problem = toy.LIS(data, "cpu")
    model = toy.build(problem, toy.configure("MHA", args, 1), False, "cpu")
    assert not [name for name, _ in model.named_parameters() if "mlp" in name or "ln_2" in name]
    x, y = problem.batch(1, 0)
    iterate, _ = model.embed(x)
    for block in model.transformer.h:
        iterate = iterate + block.attn(block.ln_1(iterate))
    torch.testing.assert_close(model(x, y)[0], model.lm_head(model.transformer.ln_f(iterate)))


@pytest.mark.slow
def test_training_beats_the_trivial_predictors(data, monkeypatch):
    """Predicting 0, and the share of the commonest digit; one unknown makes the regression easy."""
    monkeypatch.setattr(toy.Regression, "D", 1)
    args = arguments(data, steps=400, n_embd=32, learning_rate=5e-3)
    records = [toy.train(p, toy.configure("NagMHA", args, 1), args, "cpu") for p in
               (problem(data, "cpu") for problem in (toy.Regression, toy.LIS))]  # fmt: skip
    regression, lis = (r["evaluations"][-1] for r in records)
    x, y = toy.Regression(None, "cpu").held_out
    assert regression["loss"] < 0.8 * y.square().mean()
    x, y = toy.LIS(data, "cpu").held_out
    digits = y[toy.lengths(x, y)]
    shares = digits.bincount() / len(digits)
    assert lis["accuracy"] > shares.max() and lis["loss"] < -torch.xlogy(shares, shares).sum()
    assert records[0]["steps"] == list(range(0, 401, 40)) and len(records[0]["evaluations"]) == 11


@pytest.mark.slow
def test_runs_are_kept_and_tabulated(data, tmp_path, monkeypatch, capsys):
    def run(*systems, seeds=(1, 2), out="toy"):
        toy.main(["--systems", *systems, "--seeds", *map(str, seeds), "--steps", "10", "--n_embd", "8", "--device", "cpu",
                  "--data_dir", str(data), "--out", str(tmp_path / out)])  # fmt: skip
        return json.loads((tmp_path / f"{out}.json").read_text()), capsys.readouterr().out

    monkeypatch.setattr(toy, "SEQUENCES", 2)
    monkeypatch.setattr(toy, "WINDOWS", 1)
    first, _ = run("MHA", seeds=[1])
    both, text = run("MHA", "MomenMHA --beta=0.8")
    assert both[:2] == first and len(both) == 8
    key = {(r["problem"], r["system"], r["seed"]): r for r in both}
    again, _ = run("MHA", seeds=[2], out="again")
    for r in again:  # the same numbers from the same seed, other ones from another
        assert r["evaluations"] == key[r["problem"], "MHA", 2]["evaluations"]
        assert r["gradient_norms"] != key[r["problem"], "MHA", 1]["gradient_norms"]
    row = next(line for line in text.splitlines() if line.startswith("| MomenMHA --beta=0.8 |")).split("|")
    losses = [key["regression", "MomenMHA --beta=0.8", s]["evaluations"][-1]["loss"] for s in (1, 2)]
    assert float(row[2].split("±")[0]) == pytest.approx(np.mean(losses), rel=1e-2)
    assert float(row[2].split("±")[1]) == pytest.approx(np.std(losses, ddof=1), rel=0.1)
    norms = [key["regression", "MomenMHA --beta=0.8", s]["gradient_norms"] for s in (1, 2)]
    assert float(row[-2].split("±")[0]) == pytest.approx(np.mean([n[0] / n[3] for n in norms]), rel=1e-2)
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert f"{(tmp_path / 'toy.md').read_text()}{tmp_path / 'toy.png'}\n" == text
    monkeypatch.setattr(toy, "train", None)
    assert run("MomenMHA --beta=0.8", "MHA")[0] == both


def test_runs_on_other_text_are_other_runs(data, tmp_path):
    prepare.main(["lis", "--documents", "2000", "--seed", "5", "--out", str(tmp_path)])
    assert toy.LIS(data, "cpu").text != toy.LIS(tmp_path, "cpu").text
    command = ["--problems", "lis", "--systems", "MHA", "--seeds", "1", "--steps", "10", "--out", str(tmp_path / "toy")]
    for folder in (data, tmp_path, data):
        toy.main([*command, "--data_dir", str(folder)])
    one, two = json.loads((tmp_path / "toy.json").read_text())
    assert one["evaluations"] != two["evaluations"]


def test_what_does_not_fit_is_said(data, tmp_path):
    for flags, message in (
        (["--steps", "9"], "--steps 9 must be at least 10"),
        (["--systems", "MomentMHA"], "did you mean MomenMHA"),
        (["--systems", "MHA --beta=0.4"], "belongs to momentum="),
        (["--data_dir", str(tmp_path)], "python prepare.py lis"),
    ):
        with pytest.raises(UserError, match=message):
            toy.main(["--data_dir", str(data), "--out", str(tmp_path / "toy"), *flags])
