"""experiments.energy on untrained models: what it prints is what model.energies computes, and it draws something."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import checkpoint
from configurator import UserError
from data import Split, Writer
from experiments import energy
from model import GPT, GPTConfig


@pytest.fixture
def run(tmp_path):
    """A function that makes a run's folder with a checkpoint of the variant, and returns it with its model."""
    writer = Writer(tmp_path, "val", np.uint16, 1000)
    writer.add(np.random.default_rng(0).integers(257, size=1000))
    writer.flush()
    meta = dict(tokenizer="bytes", dtype="uint16", vocab_size=257, bytes=dict(train=1, val=1))
    (tmp_path / "meta.json").write_text(json.dumps(meta | dict(shards=dict(train=[], val=writer.shards))))

    def make(variant):
        torch.manual_seed(0)
        config = GPTConfig(variant=variant, n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=257)
        model = GPT(config).eval()
        where = dict(data_dir=str(tmp_path.parent), dataset=tmp_path.name)
        state = dict(model=model.state_dict(), model_config=asdict(config), config=where, tokenizer="bytes", step=7)
        checkpoint.save(tmp_path, state, best=True)
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
    expected = model.energies(torch.from_numpy(text.windows(text.fixed(3))[0]))
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
    with pytest.raises(UserError, match="no checkpoint"):
        energy.main([str(folder), "--ckpt", "none.pt"])
