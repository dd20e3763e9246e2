"""
What the tests share: tiny models, tiny runs, commands as a user runs them, and where the real data lies.

One thread per process: the models are tiny, and threads that wait for each other cost more than they give.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from data import Writer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # real text and benchmarks, where they are at hand

# knobs of a run that takes a second
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, batch_size=4, gradient_accumulation_steps=2, warmup_iters=3,
            eval_iters=2, log_interval=1, compile=False, dropout=0.1, learning_rate=1e-2)  # fmt: skip
REVERSIBLE = dict(momentum="polyak", momentum_on="both", beta=0.9, reversible=True, dropout=0.0)

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
torch.set_num_threads(1)


def needs(*names):
    """Skips a test where these folders of the real data are not at hand."""
    missing = [name for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"needs ../shared/data/{' and '.join(missing)}")


def run(*command, code=0, launcher=(sys.executable,), **env):
    """A command of the project as a second process: its standard output or, if it is to fail, its standard error."""
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=os.environ | env,
                          stdin=subprocess.DEVNULL, timeout=600)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def flags(data, out_dir, **knobs):
    """The command line of a tiny run of train.py."""
    return [f"--{k}={v}" for k, v in (TINY | dict(data_dir=data, dataset="squares", out_dir=out_dir) | knobs).items()]


def fit(data, out_dir, **knobs):
    """A tiny run in this process: its final checkpoint and its metrics."""
    import train

    train.main(flags(data, out_dir, **knobs))
    lines = (Path(out_dir) / "metrics.jsonl").read_text().splitlines()
    return checkpoint.load(Path(out_dir) / "ckpt.pt"), [json.loads(line) for line in lines]


def losses(metrics):
    return [(m["step"], m.get("train_loss"), m.get("val_loss")) for m in metrics]


def assert_same_tensors(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def tiny(variant="MHA", seed=0, noise=0.0, **choices):
    """A model of 2 layers over bytes; noise moves it away from its initialisation, where many terms vanish."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257)
    model = GPT(GPTConfig(variant=variant, **sizes | choices)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def save_run(folder, model, best=True, **more):
    """Save the checkpoint of a run that ended with this model, with the fields that other programs read."""
    state = dict(model=model.state_dict(), model_config=asdict(model.config), tokenizer="bytes", step=7)
    Path(folder).mkdir(exist_ok=True)
    checkpoint.save(folder, state | more, best)


def save_tokens(folder, vocab_size=257, **splits):
    """Save a data set in folder; splits: how many random tokens each of them has."""
    shards = dict(train=[], val=[])
    for i, (split, n) in enumerate(splits.items()):
        writer = Writer(folder, split, np.uint16, n)
        writer.add(np.random.default_rng(i).integers(vocab_size, size=n))
        shards[split] = writer.shards
    meta = dict(tokenizer="bytes", dtype="uint16", vocab_size=vocab_size, bytes=dict(train=1, val=1), shards=shards)
    (Path(folder) / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of 2,978 bytes: an epoch is 83 windows, 10.4 steps."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(1, 140)))
    run("prepare.py", "squares", "--input", folder / "text.txt", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The folder of a run of 60 steps on `data`."""
    out = tmp_path_factory.mktemp("trained")
    fit(data, out, max_iters=60, eval_interval=60, n_embd=32, dropout=0)
    return out
