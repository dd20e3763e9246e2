"""experiments.bench and bars: what they measure, their commands on tiny models, and the promises themselves."""

import json
import math

import pytest
import torch

from conftest import SHARED, fit, needs, run
from experiments import bars, bench
from guard import UserError
from model import GPT, VARIANTS, GPTConfig, newton_attention

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2", "--rounds=2"]


def test_the_correction_is_what_tau_adds():
    """Against attention itself at tau = 0 and 1, and weights written out position by position."""
    torch.manual_seed(0)
    attn = GPT(GPTConfig(variant="MHA2nd1st", n_layer=1, n_head=2, n_embd=8, block_size=7, vocab_size=11)).transformer.h[0].attn
    attn.tau.raw.data = torch.tensor([0.5, 3.0])[:, None, None]
    x = 30 * torch.randn(1, 7, 8)
    q, k, v = attn.qkv(x)
    at_0, at_1 = (newton_attention(q, k, v, torch.full((2, 1, 1), tau))[0] for tau in (0.0, 1.0))
    size, negative, negative_at_1 = bench.correction(attn, x)
    torch.testing.assert_close(size, (at_1 - at_0).norm(dim=2) / at_0.norm(dim=2), rtol=1e-4, atol=1e-5)
    for h in range(2):
        for i in range(7):
            keys = k[0, h, : i + 1]
            p = (keys @ q[0, h, i] / 2).softmax(0)
            u = p @ keys - q[0, h, i]
            s = torch.stack([(key - p @ keys) @ u for key in keys]) / 2
            for tau, share in ((attn.tau()[h].item(), negative), (1.0, negative_at_1)):
                assert share[h, i].item() == pytest.approx((p * (1 + tau * s) < 0).float().mean().item())
    assert 0 < negative_at_1.mean() < 1 and not torch.equal(negative, negative_at_1)


def results(path):
    return [record["result"] for record in json.loads(path.read_text())]


@pytest.mark.parametrize("learned", ["tau", "temperature"])
def test_taylor(data, tmp_path, learned):
    """With a learned tau, and with a fixed one."""
    fit(data, tmp_path / "MHA", variant="MHA", max_iters=2)
    fit(data, tmp_path / "MHA2nd1st", variant="MHA2nd1st", learned=learned, max_iters=2)
    bench.main(["taylor", str(tmp_path / "MHA2nd1st"), "--lengths", "8", "32", "64", f"--out={tmp_path / 'bench.json'}"])
    (found,) = results(tmp_path / "bench.json")
    assert set(found["lengths"]) == {"8", "32"} and 0 < found["lengths"]["8"]["size"] <= found["lengths"]["8"]["largest"]
    for arguments, message in (([], "out_dir"), ([str(tmp_path / "MHA")], "train one with --curvature=newton")):
        with pytest.raises(UserError, match=message):
            bench.main(["taylor", *arguments])
    with pytest.raises(UserError, match="no variant is named NagMH"):
        bench.main(["steps", "--variants", "NagMH"])


@pytest.mark.slow
def test_bench(tmp_path):
    out = f"--out={tmp_path / 'bench.json'}"
    bench.main(["steps", *SMALL, "--new_tokens=40", out])
    bench.main(["steps", *SMALL, "--block_size=256", "--variants", "MHA", "--peak", out])
    bench.main(["lengths", *SMALL, "--variants", "MHA", "LinearMHA", "--lengths", "16", "32", out])
    bench.main(["memory", *SMALL, "--depths", "2", "12", out])
    bench.main(["loss", *SMALL, "--vocab_size=2048", "--loss_chunk=16", out])
    steps, peaks, lengths, memory, loss = results(tmp_path / "bench.json")
    assert set(steps) == {*VARIANTS, bench.NANOGPT}
    assert all(0 < r["forward"] < r["step"] and 0 < r["backward"] < r["step"] and r["generation"] > 0 for r in steps.values())
    assert set(lengths) == {"MHA", "LinearMHA"} and set(lengths["MHA"]) == {"16", "32"}
    assert set(memory) == {"plain", "reversible"} and memory["plain"]["12"] > 3 * memory["plain"]["2"] > 0
    assert peaks["MHA"]["peak_mb"] > 0 and len(loss) == 3
    assert loss["all logits"]["peak_mb"] > loss["checkpointed"]["peak_mb"]
    assert (tmp_path / "bench_memory.png").exists() and (tmp_path / "bench_lengths.png").exists()


def test_peak_is_what_autograd_holds():
    """Of a step that keeps n MB from its forward to its backward pass."""

    def step(mb):
        def once():
            y = [x.exp() for _ in range(mb)]  # autograd keeps each, 1 MB
            loss = sum(t.sum() for t in y)
            del y
            loss.backward()
            x.grad = None

        return once

    x = torch.zeros(1 << 18, requires_grad=True)
    for mb in (4, 9):
        assert bench.peak(step(mb)) == pytest.approx(mb + 2, abs=1.1)  # and a gradient and what is added to it


@pytest.mark.slow
@needs("minipile-standin", "tiktoken_cache")
def test_every_promise_is_measured(tmp_path, monkeypatch):
    """A number for each, whatever it is, on tiny models: speed is for make bench, on a machine that does nothing else."""
    for name, sizes in (("BYTES", {}), ("SIZES", {}), ("GPT30M", dict(vocab_size=500))):
        tiny = dict(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=257, batch_size=4)
        monkeypatch.setattr(bars, name, tiny | sizes)
    monkeypatch.setattr(bars, "COPIES", 1)
    command = ["--rounds=1", "--generations=1", "--margin=1e9", f"--source={SHARED / 'minipile-standin'}", "--workers=1"]
    bars.main([*command, f"--out={tmp_path / 'bars.json'}"])
    (table,) = results(tmp_path / "bars.json")
    measured = {what for what, _, promise in table if promise}
    assert measured == {what for what, (_, *bar) in bars.PROMISES.items() if bar[bench.DEVICE == "cuda"] is not None}
    assert all(math.isfinite(float(value)) for _, value, _ in table)


def test_the_end_of_another_process_is_one_line():
    with pytest.raises(UserError, match=r"the process of divmod\(0,\) ended"):
        bench.elsewhere(divmod, 1, 0)()


def test_a_missed_bar_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(bars, "PROMISES", dict(up=(">=", 3.0, 3.0), down=("<=", 1.0, 1.0)))
    monkeypatch.setitem(bars.PARTS, "starting", lambda args: iter([("up", 1.4), ("down", 1.4), ("shown", 9.0)]))
    command = ["starting", f"--out={tmp_path / 'bars.json'}"]
    bars.main([*command, "--margin=2.2"])
    for margin, missed in (("2", "up is 1.4, its bar >= 3"), ("1.3", "up is .*\ndown is 1.4, its bar <= 1")):
        with pytest.raises(UserError, match=missed):
            bars.main([*command, "--margin", margin])
    assert len(results(tmp_path / "bars.json")) == 3  # what missed is on record as well
    for wrong, words in ((["preparing"], "--source"), (["--nanogpt=nowhere"], "nowhere/model.py does not exist"),
                         (["stating"], "stating is none of")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            bars.main([*wrong, f"--out={tmp_path / 'bars.json'}"])


@pytest.mark.slow
def test_the_table_of_variants():
    lines = run("-m", "experiments.variants").splitlines()
    assert len(lines) == 2 + len(VARIANTS)
    assert "| `MHA` | nanoGPT |  | 39,419,904 | 85,056,000 | 0 |" in lines[2]
