"""For all tests: one thread a process, for the models are tiny and threads that wait for each other cost more than they give;
and a small data set with a model trained on it."""

import os

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of 3,000 bytes: an epoch is 84 windows, 10.5 steps."""
    from test_train import run

    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(1, 140)))
    run("prepare.py", "squares", "--input", folder / "text.txt", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The folder of a run of 60 steps on it."""
    from test_train import fit

    out = tmp_path_factory.mktemp("trained")
    fit(data, out, max_iters=60, eval_interval=60, n_embd=32, dropout=0)
    return out
