"""experiments.idea and pictures: paths against plain loops over the gradient, and that they show what the texts say."""

import pytest
import torch

from conftest import run
from experiments import idea, pictures
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


def test_look_ahead_asks_where_the_velocity_leads():
    x, v, ends = pictures.look_ahead()
    torch.testing.assert_close(ends["polyak"], x + 0.9 * v - gradient(x))
    torch.testing.assert_close(ends["nesterov"], x + 0.9 * v - gradient(x + 0.9 * v))
    assert idea.free_energy(ends["nesterov"]) < idea.free_energy(ends["polyak"])


def test_splittings_ask_in_their_orders():
    x, swirl = torch.tensor([1.0, -1.9]).double(), pictures.swirl
    ends = {splitting: pictures.split(splitting, x)[0][-1] for splitting in ("lie_trotter", "euler", "strang")}
    torch.testing.assert_close(ends["euler"], x - gradient(x) + swirl(x))
    y = x - gradient(x)
    torch.testing.assert_close(ends["lie_trotter"], y + swirl(y))
    y = x - gradient(x) / 2
    y = y + swirl(y)
    torch.testing.assert_close(ends["strang"], y - gradient(y) / 2)
    far = {splitting: float((end - pictures.flow(x)[-1]).norm()) for splitting, end in ends.items()}
    assert far["strang"] < min(far["euler"], far["lie_trotter"])


def test_tau_moves_weight_from_the_first_key():
    """And MHA2nd1st's weights can fall below zero, which those of LightMHA2nd1st, a softmax, cannot."""
    of = {attend: [pictures.weights(attend, torch.tensor(tau).double()) for tau in (0.0, 0.5, 1.0)]
          for attend in (pictures.newton_attention, pictures.light_attention)}  # fmt: skip
    for ws in of.values():
        torch.testing.assert_close(torch.stack(ws).sum(1), torch.ones(3).double())
        assert ws[0][0] > ws[1][0] > ws[2][0] and (ws[0].diff() <= 0).all()
    newton, light = ([float(w.min()) for w in ws] for ws in of.values())
    assert newton[2] < 0 < min(light)


def test_steps_are_undone_up_to_rounding():
    errors = {}
    for dtype in (torch.float32, torch.float64):
        there, back = pictures.there_and_back(0.5, dtype)
        assert (there[0] - there[-1]).norm() > 3
        errors[dtype] = float((there - back).norm(dim=1).max())
    assert errors[torch.float64] < 1e-9 < 1e-4 < errors[torch.float32]


def test_pictures_of_learn(tmp_path):
    pictures.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"learn_{name}.png" for name in pictures.PICTURES}
    with pytest.raises(UserError, match="cannot write .*; choose another --out"):
        pictures.main(["--out", str(tmp_path / "missing")])
