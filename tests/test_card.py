"""experiments.card: its rehearsal, which does all of it at toy size, and what it refuses."""

import json

import pytest
import torch

from experiments import card
from guard import UserError
from model import VARIANTS


@pytest.mark.slow
def test_rehearsal(data, tmp_path, monkeypatch):
    """Every part has its table, with a row for each thing that it compares, and finds nothing wrong."""
    monkeypatch.chdir(tmp_path)
    card.main(["--rehearse", "--dataset=squares", f"--data_dir={data}", "--out=here", "--minutes=15"])
    tables = {table["title"]: table["rows"] for table in json.loads((tmp_path / "here" / "card.json").read_text())}
    assert list(tables) == list(card.PARTS)
    assert set(tables["training"]) == set(card.TIMED) and all(row["tokens/s"] > 0 for row in tables["training"].values())
    assert len(tables["generation"]) == 6 and all(row["ms per token"] > 0 for row in tables["generation"].values())
    for part in ("gradients", "cached", "resumed"):
        assert set(tables[part]) == set(VARIANTS) and all(row["right"] for row in tables[part].values())
    assert all(row["right"] for row in tables["short_runs"].values())
    assert set(tables["learning"]) == {f"{name}, seed {n}" for name in card.LEARNING for n in (1, 2)}
    losses = [row["loss"] for row in tables["learning"].values()]
    assert max(losses) < 5.5 and len({*losses}) == len(losses)
    assert "after 60 steps\n\nThe" in (tmp_path / "here" / "sample.txt").read_text()
    assert (tmp_path / "here" / "learning.png").exists() and (tmp_path / "here" / "learning.md").exists()


def test_what_is_kept_of_a_part_that_fails(tmp_path, monkeypatch, capsys):
    """The rows before the error, and the error; the parts after it are done, and the end says what went wrong."""

    def failing(args):
        yield "one", dict(right=True)
        raise RuntimeError("no memory")

    monkeypatch.setattr(card, "PARTS", dict(failing=failing, fine=lambda args: iter([("two", dict(speed=1.5))])))
    with pytest.raises(UserError, match="went wrong in failing$"):
        card.main(["--rehearse", f"--out={tmp_path}"])
    failed, fine = (table["rows"] for table in json.loads((tmp_path / "card.json").read_text()))
    assert failed == dict(one=dict(right=True), error=dict(right=False, error="no memory")) and fine["two"]["speed"] == 1.5
    assert "no memory" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="went wrong in failing$"):
        card.main(["--rehearse"])
    assert (tmp_path / "out" / "rehearsal" / "card.json").exists()  # not among the results of a card


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="learn is none of training, .*learning"):
        card.main(["learn", f"--out={tmp_path}"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA card: --rehearse"):
            card.main([f"--out={tmp_path}"])
