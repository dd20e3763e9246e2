"""experiments.bench: the correction that it measures, and its commands on tiny models."""

import json

import pytest
import torch

import train
from configurator import UserError
from experiments import bench
from model import GPT, VARIANTS, GPTConfig, newton_attention
from test_train import TINY

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2", "--rounds=2"]


def test_the_correction_is_what_tau_adds():
    """Against attention itself at tau = 0 and 1, and weights written out position by position."""
    torch.manual_seed(0)
    attn = GPT(GPTConfig(variant="MHA2nd1st", n_layer=1, n_head=2, n_embd=8, block_size=7, vocab_size=11)).transformer.h[0].attn
    attn.tau.raw.data += torch.tensor([0.5, 3.0])[:, None, None]
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


def lines(path):
    return [json.loads(text)["result"] for text in path.read_text().splitlines()]


def test_taylor(data, tmp_path, capsys):
    for variant in ("MHA2nd1st", "MHA"):
        knobs = TINY | dict(data_dir=data, dataset="squares", out_dir=tmp_path / variant, variant=variant, max_iters=2)
        train.main([f"--{k}={v}" for k, v in knobs.items()])
    bench.main(["taylor", str(tmp_path / "MHA2nd1st"), "--lengths", "8", "32", "64", f"--out={tmp_path / 'bench.jsonl'}"])
    (found,) = lines(tmp_path / "bench.jsonl")
    assert set(found["lengths"]) == {"8", "32"} and 0 < found["lengths"]["8"]["size"] <= found["lengths"]["8"]["largest"]
    for arguments, message in (([], "out_dir"), ([str(tmp_path / "MHA")], "train one with --curvature=newton")):
        with pytest.raises(UserError, match=message):
            bench.main(["taylor", *arguments])
    with pytest.raises(UserError, match="no variant is named NagMH"):
        bench.main(["steps", "--variants", "NagMH"])


@pytest.mark.slow
def test_bench(tmp_path):
    out = f"--out={tmp_path / 'bench.jsonl'}"
    bench.main(["steps", *SMALL, "--new_tokens=40", out])
    bench.main(["steps", *SMALL, "--block_size=256", "--variants", "MHA", "--peak", out])
    bench.main(["lengths", *SMALL, "--variants", "MHA", "LinearMHA", "--lengths", "16", "32", out])
    bench.main(["memory", *SMALL, "--depths", "2", "12", out])
    steps, peaks, lengths, memory = lines(tmp_path / "bench.jsonl")
    assert set(steps) == {*VARIANTS, bench.BASELINE}
    assert all(0 < r["forward"] < r["step"] and 0 < r["backward"] < r["step"] and r["generation"] > 0 for r in steps.values())
    assert set(lengths) == {"MHA", "LinearMHA"} and set(lengths["MHA"]) == {"16", "32"}
    assert set(memory) == {"plain", "reversible"} and set(memory["plain"]) == {"2", "12"} and "peak_mb" in peaks[bench.BASELINE]
    assert (tmp_path / "bench_memory.png").exists() and (tmp_path / "bench_lengths.png").exists()
