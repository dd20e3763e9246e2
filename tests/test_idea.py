"""experiments.idea: the paths against plain loops over the gradient, and that they show what the README says."""

import pytest
import torch

from conftest import run
from experiments import idea
from guard import UserError


def gradient(q):
    q = q.detach().requires_grad_()
    return torch.autograd.grad(idea.free_energy(q), q)[0]


def test_paths_are_descents_of_the_free_energy():
    """Gradient descent, the heavy ball and Nesterov's look-ahead, written as loops."""
    for variant, beta, mu in ("MHA", 0.0, 0.0), ("MomenMHA", 0.5, 0.0), ("NagMHA", 0.9, 0.9):
        x, v = torch.tensor(idea.START, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for found in idea.path(variant):
            torch.testing.assert_close(found, x)
            v = beta * v - gradient(x + mu * v)
            x = x + v


def test_the_four_differ_as_the_readme_says():
    """Attention creeps, the heavy ball climbs most on its way, look-ahead less, Newton needs fewer layers than attention."""
    F = {variant: idea.free_energy(idea.path(variant)) for variant in idea.SYSTEMS}
    near = {variant: int((f < f[-1] + 0.05).int().argmax()) for variant, f in F.items()}
    climbs = {variant: float(f.diff().clamp(min=0).sum()) for variant, f in F.items()}
    assert near["NagMHA"] < near["MHA2nd1st"] < near["MHA"] and near["MHA"] > 10
    assert climbs["MomenMHA"] > 0.5 > 0.05 > climbs["NagMHA"] and climbs["MHA"] == 0 == climbs["MHA2nd1st"]


def test_attention_that_is_no_gradient_step_is_noticed(monkeypatch):
    monkeypatch.setattr(idea, "K", idea.K * torch.tensor([1.0, 1.1]))  # keys of several norms
    with pytest.raises(AssertionError):
        idea.assert_gradient(idea.path("MHA"))


def test_where_no_picture_can_be_written(tmp_path):
    for name in "idea.png", "idea.gif":
        with pytest.raises(UserError, match="cannot write .*; choose another --out"):
            idea.main(["--out", str(tmp_path / "missing" / name)])


def test_pictures(tmp_path):
    """One that stands and one that moves, small enough for a README."""
    for name, start in ("idea.png", b"\x89PNG"), ("idea.gif", b"GIF89a"):
        run("-m", "experiments.idea", "--out", tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data.startswith(start) and 50_000 < len(data) < 1_000_000
