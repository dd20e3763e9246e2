"""Faults injected for real: what a run keeps when it is killed, interrupted, starved or given something broken."""

import builtins
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
import data as shards
import sample
import train
from configurator import parse
from conftest import ROOT, TINY, assert_same_tensors, fit, flags, losses, run
from guard import UserError, stop_signals
from model import GPT

STEPS = dict(max_iters=20, eval_interval=8, lr_decay_iters=20)


started = []  # processes


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while started:
        started[-1].kill()
        started.pop().wait()


def start(*arguments, before="", stdout=subprocess.DEVNULL, **env):
    """train.py in a process of its own, which runs the Python text `before` first."""
    code = f"import os, signal, sys, time, torch, train\n{before}\ntrain.cli(train.main)"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | env, text=True,
                               stdout=stdout, stderr=subprocess.PIPE)  # fmt: skip
    started.append(process)
    return process


def two(*arguments, before="", **env):
    """The same as two processes with gloo, without a launcher that would watch them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [start(*arguments, before=before, RANK=r, LOCAL_RANK=r, **where, **env) for r in "01"]


def wait_for_lines(out_dir, n, process):
    """Wait until the run has written n lines of metrics, or has ended."""
    path, deadline = Path(out_dir) / "metrics.jsonl", time.time() + 180
    while not (path.exists() and path.read_bytes().count(b"\n") >= n) and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.005)


def assert_same_run(out_dir, data, whole):
    """Resumed to the end, the run is the uninterrupted one: weights, optimizer and metrics."""
    state, metrics = fit(data, out_dir, init_from="resume", **STEPS)
    assert_same_tensors(state["model"], whole[0]["model"])
    assert_same_tensors(state["optimizers"][0]["state"], whole[0]["optimizers"][0]["state"])
    assert losses(metrics) == losses(whole[1])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("whole"), **STEPS)


# ----------------------------------------------------------------------------------------------------------------------
# killed


class Crash(BaseException):
    pass


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_a_crash_between_any_two_operations_of_a_save(tmp_path, monkeypatch, best, links):
    """ckpt.pt is the old or the new checkpoint, ckpt_prev.pt and best.pt are whole; and another save works."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    state = dict(model={"w": torch.arange(1000.0)}, model_config={}, tokenizer="bytes")
    names = [(os, "link"), (os, "replace"), (os, "fsync"), (os, "unlink"), (torch, "save"), (builtins, "open")]
    for crash_at in range(100):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        for step in range(3):
            checkpoint.save(folder, state | dict(step=step), best=step == 1)
        left = iter(range(crash_at))  # calls until the crash

        def or_crash(operation, left=left):
            def counted(*args, **kwargs):
                if next(left, None) is None:
                    raise Crash
                return operation(*args, **kwargs)

            return counted

        with monkeypatch.context() as patched:
            for module, name in names:
                patched.setattr(module, name, or_crash(getattr(module, name)))
            try:
                checkpoint.save(folder, state | dict(step=3), best)
                crashed = False
            except Crash:
                crashed = True
        steps = {name: checkpoint.load(folder / name)["step"] for name in ("ckpt.pt", "ckpt_prev.pt", "best.pt")}
        assert steps["ckpt.pt"] in (2, 3) and steps["best.pt"] in ((1, 3) if best else (1,))
        assert steps["ckpt_prev.pt"] in (1, 2) and (steps["ckpt.pt"] == 2 or steps["ckpt_prev.pt"] == 2)
        checkpoint.save(folder, state | dict(step=4), best=False)
        assert checkpoint.load(folder / "ckpt.pt")["step"] == 4
        if not crashed:
            assert (steps["ckpt.pt"], steps["ckpt_prev.pt"]) == (3, 2) and crash_at > 5
            assert sorted(os.listdir(folder)) == ["best.pt", "ckpt.pt", "ckpt_prev.pt"]
            return


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut leaves whole files: each is synced before it takes its name, and then the folder is."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append((name, *args)) or real(*args))
    state = dict(model={}, model_config={}, tokenizer="bytes")
    checkpoint.save(tmp_path, state, best=True)
    assert [call[0] for call in calls] == ["fsync", "replace", "replace", "fsync"]  # the file, best.pt, ckpt.pt, the folder
    assert calls[2][2] == os.path.join(tmp_path, "ckpt.pt")


def test_metrics_are_on_the_disk_before_the_checkpoint(data, tmp_path, monkeypatch):
    """So that after a power cut they reach as far as the run that is resumed."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(os.path.basename(getattr(file, "name", ""))) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(f"to {os.path.basename(b)}") or replace(a, b))
    fit(data, tmp_path, max_iters=2)
    saves = [i for i, call in enumerate(calls) if call == "to ckpt.pt"]
    assert len(saves) == 2
    for start, end in zip((0, saves[0]), saves, strict=True):
        assert "metrics.jsonl" in calls[start:end]


def test_the_metrics_of_a_run_stay_until_another_has_its_first_checkpoint(data, tmp_path):
    """Also if the disk takes no checkpoint."""
    fit(data, tmp_path, **STEPS | dict(max_iters=8))
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    limit = (tmp_path / "ckpt.pt").stat().st_size // 8  # too little for the weights, enough for the metrics
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with pytest.raises(UserError, match="cannot write .*ckpt.pt"):
            fit(data, tmp_path, **STEPS | dict(max_iters=8, seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert kept == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}


def test_killed_while_a_checkpoint_is_written(data, whole, tmp_path):
    """The process dies with half a file written: the checkpoint before it loads, and the run goes on from there."""
    half = """
save = torch.save
def torch_save(state, file):
    save(state, file)
    if state["step"] == 16:
        file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = torch_save"""
    process = start(*flags(data, tmp_path, **STEPS), before=half)
    assert process.wait(180) == -signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 8
    assert_same_run(tmp_path, data, whole)
    assert checkpoint.load(tmp_path / "ckpt_prev.pt")["step"] == 16


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_once(data, whole, tmp_path):
    """The resumed run removes lines of the steps that it repeats, evaluations too, however late it writes its first line."""
    fit(data, tmp_path, **STEPS | dict(max_iters=8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        for line in whole[1][whole[1].index(next(m for m in whole[1] if m["step"] == 8 and "train_loss" in m)) :][:9]:
            file.write(json.dumps(line | dict(seconds=0)) + "\n")
    state, metrics = fit(data, tmp_path, init_from="resume", log_interval=7, **STEPS)
    assert [step for step, *_ in losses(metrics)] == sorted(step for step, *_ in losses(metrics))
    assert [m["step"] for m in metrics if "val_loss" in m] == [0, 8, 16, 20]
    assert [m["step"] for m in metrics if "train_loss" in m] == [*range(8), 14]


@pytest.mark.slow
def test_killed_fifty_times(data, tmp_path):
    """kill -9 at random moments of a real run, each time resumed: in the end it is the run that nobody touched."""
    knobs = dict(max_iters=1500, eval_interval=3, lr_decay_iters=1500, log_interval=7, gradient_accumulation_steps=1)
    expected, metrics = fit(data, tmp_path / "whole", **knobs)
    moment, kills, furthest = random.Random(0), 0, []
    (tmp_path / "killed").mkdir()
    while kills < 50:
        lines = tmp_path / "killed" / "metrics.jsonl"
        before = lines.read_bytes().count(b"\n") if lines.exists() else 0
        resume = (tmp_path / "killed" / "ckpt.pt").exists()
        process = start(*flags(data, tmp_path / "killed", init_from="resume" if resume else "scratch", **knobs))
        if kills % 5:  # every fifth time, while it starts
            wait_for_lines(tmp_path / "killed", before + 2, process)
        time.sleep(moment.uniform(0, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        kills += 1
        if resume:
            furthest.append(checkpoint.load(tmp_path / "killed" / "ckpt.pt")["step"])
    assert furthest == sorted(furthest) and furthest[0] < furthest[-1] < 1500
    state, resumed = fit(data, tmp_path / "killed", init_from="resume", **knobs)
    assert_same_tensors(state["model"], expected["model"])
    assert_same_tensors(state["optimizers"][0]["state"], expected["optimizers"][0]["state"])
    assert losses(resumed) == losses(metrics)
    assert not list((tmp_path / "killed").glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_step_and_saves(data, whole, tmp_path, monkeypatch, capsys, request, number):
    """The run ends after its step with a checkpoint, and resumed it becomes the uninterrupted one."""
    rate = train.learning_rate

    def interrupted(step, cfg):
        if step == 10 and cfg.init_from == "scratch":
            signal.raise_signal(number)
            signal.raise_signal(number)  # as a launcher may repeat it
        return rate(step, cfg)

    monkeypatch.setattr(train, "learning_rate", interrupted)
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup these tests, and so the run, would ignore SIGHUP
    request.addfinalizer(lambda: signal.signal(number, inherited))
    state, metrics = fit(data, tmp_path, **STEPS)
    assert state["step"] == 11 and metrics[-1]["step"] == 10 and "after 11 steps" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "ckpt_prev.pt")["step"] == 8
    assert signal.getsignal(number) is signal.SIG_DFL
    assert_same_run(tmp_path, data, whole)


def test_under_nohup_a_dropped_connection_stops_nothing(request):
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, inherited))
    with stop_signals() as caught:
        signal.raise_signal(signal.SIGHUP)
    assert not caught


# hangs without returning to Python, as a process does that waits for others
HANGS = "train.learning_rate = lambda *_: torch.distributed.TCPStore('127.0.0.1', 0, 2, True)"


def test_a_signal_from_outside_and_a_second_one(data, tmp_path):
    """The first ends a run with exit code 0; in a step that never ends it does nothing yet, and a later one kills."""
    knobs = STEPS | dict(max_iters=9_000, eval_interval=9_000)
    process = start(*flags(data, tmp_path / "one", **knobs))
    hangs = start(*flags(data, tmp_path / "two", **knobs), before=HANGS)
    wait_for_lines(tmp_path / "one", 5, process)
    wait_for_lines(tmp_path / "two", 1, hangs)
    for each in (process, hangs):
        each.send_signal(signal.SIGTERM)
    assert process.wait(180) == 0, process.stderr.read()
    state = checkpoint.load(tmp_path / "one" / "ckpt.pt")
    assert state["step"] == json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 1
    time.sleep(1.2)
    assert hangs.poll() is None
    hangs.send_signal(signal.SIGTERM)
    assert hangs.wait(180) == 128 + signal.SIGTERM and "stopping after this step" in hangs.stderr.read()


def test_a_reader_that_goes_away_does_not_end_the_run(data, tmp_path):
    """Standard output and error closed by whoever reads them, as by | head or a dropped connection."""
    process = subprocess.Popen([sys.executable, "train.py", *flags(data, tmp_path, max_iters=40, eval_interval=40)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    started.append(process)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(180) == 0 and checkpoint.load(tmp_path / "ckpt.pt")["step"] == 40


def test_a_run_needs_no_standard_output(data, tmp_path):
    """As a daemon that was started with it closed."""
    command = [sys.executable, "train.py", *flags(data, tmp_path, max_iters=3)]
    subprocess.run(["bash", "-c", 'exec "$@" >&-', "bash", *command], cwd=ROOT, check=True, timeout=180)
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 3


def test_two_runs_never_share_a_folder(data, tmp_path):
    """The second's error names the first's process and start; once that is killed a run goes on; an evaluation may look."""
    knobs = STEPS | dict(max_iters=9_000, eval_interval=9_000)
    first = start(*flags(data, tmp_path, **knobs))
    wait_for_lines(tmp_path, 5, first)
    for init_from in ("scratch", "resume"):
        with pytest.raises(UserError, match=rf"in use by process {first.pid}, started 20\d\d-"):
            fit(data, tmp_path, **knobs | dict(init_from=init_from))
    train.main(flags(data, tmp_path, **knobs | dict(init_from="resume", eval_only=True)))
    first.kill()
    first.wait()
    fit(data, tmp_path, **knobs | dict(init_from="resume", max_iters=3))
    fit(data, tmp_path, **knobs | dict(max_iters=3))  # nor does a run that ended hold it


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(data, tmp_path):
    """Both stop after the same step, and the resumed pair does what an uninterrupted pair does."""
    knobs = STEPS | dict(max_iters=60, eval_interval=60, lr_decay_iters=60, dropout=0.1)
    for process in two(*flags(data, tmp_path / "whole", **knobs)):
        assert process.wait(180) == 0, process.stderr.read()
    pair = two(*flags(data, tmp_path / "parts", **knobs))
    wait_for_lines(tmp_path / "parts", 10, pair[0])
    pair[1].send_signal(signal.SIGUSR1)
    for process in pair:
        assert process.wait(180) == 0, process.stderr.read()
    assert 9 <= checkpoint.load(tmp_path / "parts" / "ckpt.pt")["step"] < 60
    for process in two(*flags(data, tmp_path / "parts", init_from="resume", **knobs)):
        assert process.wait(180) == 0, process.stderr.read()
    whole, parts = (checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert_same_tensors(parts["model"], whole["model"])


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(data, tmp_path):
    """Ctrl-C reaches the processes from the terminal and from torchrun: one checkpoint all the same."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += flags(data, tmp_path, **STEPS | dict(max_iters=9_000, eval_interval=9_000))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    started.append(process)
    wait_for_lines(tmp_path, 10, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(180) == 1  # torchrun's own exit code
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] >= 9


# ----------------------------------------------------------------------------------------------------------------------
# divergence


def spoil(monkeypatch, steps, loss=lambda x: x, gradient=None):
    """Change the loss, or one gradient, of these training steps."""
    forward, count = GPT.forward, -1

    def spoiled(self, *args, **kwargs):
        nonlocal count
        logits, value = forward(self, *args, **kwargs)
        if self.training and not value.is_meta:  # flops_per_token() runs the model on meta tensors
            count += 1
            if count // TINY["gradient_accumulation_steps"] in steps:
                value = loss(value)
                if gradient:
                    logits.register_hook(gradient)
        return logits, value

    monkeypatch.setattr(GPT, "forward", spoiled)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_stops_before_the_update(data, tmp_path, monkeypatch, where, number):
    """NaN or Inf in the loss or a gradient: no update, an error with step, rate and last checkpoint, and its advice works."""
    updates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: updates.append(1) or step(self, *a))
    spoil(monkeypatch, [13], **{where: lambda x: x * number})
    with pytest.raises(UserError) as error:
        fit(data, tmp_path, **STEPS)
    text = str(error.value)
    assert "step 13" in text and "after 8 steps" in text and "rate 0.00" in text and str(tmp_path / "ckpt.pt") in text
    assert sum(updates) == 13 and checkpoint.load(tmp_path / "ckpt.pt")["step"] == 8
    monkeypatch.undo()
    state, _ = fit(data, tmp_path, init_from="resume", learning_rate=1e-3, **STEPS)  # as the message says
    assert state["step"] == 20


def test_a_validation_loss_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch):
    """The run ends, and the last good checkpoint stays."""
    evaluated = []
    forward = GPT.forward

    def broken(self, *args):
        logits, loss = forward(self, *args)
        evaluated.append(not self.training)
        return logits, loss * (math.nan if sum(evaluated) > 4 and not self.training else 1)

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(UserError, match="step 16: the validation loss is nan"):
        fit(data, tmp_path, **STEPS)
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 8


def test_a_spike(data, tmp_path, monkeypatch, capsys):
    """Three steps in a row at over twice the running mean get a line or, with on_spike=stop, end the run; two do not."""
    spoil(monkeypatch, [11, 12, 13], loss=lambda x: 10 * x)
    fit(data, tmp_path / "report", **STEPS)
    assert capsys.readouterr().out.count("twice its running mean") == 1
    monkeypatch.undo()
    spoil(monkeypatch, [11, 12, 13], loss=lambda x: 10 * x)
    with pytest.raises(UserError, match="step 13: the loss, .* over twice its running mean"):
        fit(data, tmp_path / "stop", on_spike="stop", **STEPS)
    assert checkpoint.load(tmp_path / "stop" / "ckpt.pt")["step"] == 8
    monkeypatch.undo()
    spoil(monkeypatch, [11, 12, 14], loss=lambda x: 10 * x)
    fit(data, tmp_path / "two", on_spike="stop", **STEPS)


def test_a_spike_is_seen_across_a_resume(data, tmp_path, monkeypatch):
    """One high loss before the stop and two after it are three in a row."""
    spoil(monkeypatch, [7, 8, 9], loss=lambda x: 10 * x)
    fit(data, tmp_path, **STEPS | dict(max_iters=8))
    monkeypatch.undo()
    spoil(monkeypatch, [0, 1], loss=lambda x: 10 * x)
    with pytest.raises(UserError, match="step 9: .* twice"):
        fit(data, tmp_path, init_from="resume", on_spike="stop", **STEPS)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float16_overflow_skips_the_update(data, tmp_path, monkeypatch, optimizer):
    """It skips the update of every optimizer and halves the scale, and the run goes on."""
    updates, kinds = [], (torch.optim.AdamW, train.Muon)
    for kind in kinds:
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, *a, step=step, **k: updates.append(type(self)) or step(self, *a, **k))
    spoil(monkeypatch, [13], gradient=lambda g: g * math.inf)
    state, metrics = fit(data, tmp_path, dtype="float16", optimizer=optimizer, **STEPS)
    assert [updates.count(kind) for kind in kinds] == [19, 19 if optimizer == "muon" else 0]
    assert state["scaler"]["scale"] == 2**15 and state["scaler"]["_growth_tracker"] == 6
    assert metrics[-1]["val_loss"] < 4


def test_the_best_checkpoint_is_the_best_across_a_resume(data, tmp_path, monkeypatch):
    """The rate is ruinous from step 8 on, so what follows is worse."""
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 1e-2 if step < 8 else 0.3)
    whole, metrics = fit(data, tmp_path / "whole", **STEPS)
    fit(data, tmp_path / "parts", **STEPS | dict(max_iters=16))
    parts, resumed = fit(data, tmp_path / "parts", init_from="resume", **STEPS)
    assert losses(resumed) == losses(metrics) and parts["best_loss"] == whole["best_loss"]
    for folder in ("whole", "parts"):
        best = checkpoint.load(tmp_path / folder / "best.pt")
        assert best["step"] == 8 and best["best_loss"] == whole["best_loss"] < metrics[-1]["val_loss"]
    seconds = [line["seconds"] for line in resumed]
    assert seconds == sorted(seconds)


# ----------------------------------------------------------------------------------------------------------------------
# several processes

NAN_ON_ONE = """
forward = train.GPT.forward
def broken(self, *args):
    logits, loss = forward(self, *args)
    broken.calls += self.training and not loss.is_meta
    return logits, loss * (float("nan") if broken.calls > 11 and os.environ["RANK"] == "1" else 1)
broken.calls = 0
train.GPT.forward = broken"""


@pytest.mark.slow
def test_nan_on_one_process_stops_both(data, tmp_path):
    """With the same error, before the same update."""
    for process in two(*flags(data, tmp_path, **STEPS), before=NAN_ON_ONE):
        assert process.wait(180) == 1
        assert "error: step 11: the loss is nan" in process.stderr.read()
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("number, timeout", [(signal.SIGKILL, 9_000), (signal.SIGSTOP, 8)])
def test_a_dead_or_silent_process_ends_the_other(data, tmp_path, number, timeout):
    """With one line: a dead one at once, however long the timeout; a silent one after --timeout seconds."""
    pair = two(*flags(data, tmp_path, **STEPS | dict(max_iters=9_000, eval_interval=9_000, timeout=timeout)))
    wait_for_lines(tmp_path, 10, pair[0])
    pair[1].send_signal(number)
    assert pair[0].wait(180) == 1
    assert f"another process ended or did not answer within timeout={timeout} seconds" in pair[0].stderr.read()
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_machines(data, tmp_path, killed):
    """A torchrun on each, here two on one machine: a run of both and, where one of them is killed, an end and a checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=run",
                f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "train.py"]  # fmt: skip
    steps = dict(max_iters=9_000, eval_interval=9_000) if killed else {}
    command = [sys.executable, *launcher, *flags(data, tmp_path, **STEPS | dict(timeout=60) | steps)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    machines = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in "ab"]
    started.extend(machines)
    if killed:
        wait_for_lines(tmp_path, 10, machines[0])
        threads = Path(f"/proc/{machines[1].pid}/task").glob("*/children")
        processes = [int(pid) for children in threads for pid in children.read_text().split()]  # in sessions of their own
        for pid in (*processes, machines[1].pid):
            os.kill(pid, signal.SIGKILL)
        assert "error: another process ended" in machines[0].communicate(timeout=180)[0] and machines[0].returncode == 1
        assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 0
    else:
        printed = [machine.communicate(timeout=300)[0] for machine in machines]
        assert all(machine.returncode == 0 for machine in machines), printed
        assert sum("2 process(es)" in text for text in printed) == 1  # the first process speaks for all
        assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 20


SAVE_GRADIENTS = """
clip, windows, seen = torch.nn.utils.clip_grad_norm_, train.Split.windows, []
def keep(parameters, norm):
    parameters = list(parameters)
    torch.save([p.grad for p in parameters], f"{sys.argv[-1][10:]}/gradients{os.environ.get('RANK', 0)}.pt")
    return clip(parameters, norm)
def count(self, starts):
    seen.append(len(starts))
    torch.save(seen, f"{sys.argv[-1][10:]}/windows{os.environ.get('RANK', 0)}.pt")
    return windows(self, starts)
torch.nn.utils.clip_grad_norm_, train.Split.windows = keep, count"""


WATCH = """
from torch.profiler import ProfilerActivity, profile
watch, trained = profile(activities=[ProfilerActivity.CPU]), train.Log.trained
def look(self, step, *args):
    trained(self, step, *args)
    if step == 3:
        watch.start()
    if step == 4:
        watch.stop()
        names = {"CompiledFunctionBackward": "backward", "c10d::allreduce_": "exchange"}
        events = [names[e.name] for e in sorted(watch.events(), key=lambda e: e.time_range.start) if e.name in names]
        with open(f"{sys.argv[-1][10:]}/events{os.environ['RANK']}", "w") as file:
            file.write(" ".join(events))
train.Log.trained = look"""


@pytest.mark.slow
def test_gradients_are_exchanged_within_the_backward_pass(data, tmp_path):
    """Of a compiled step: the first exchange begins while parts of the backward pass are still to come."""
    sizes = STEPS | dict(n_layer=4, n_embd=256, dropout=0, max_iters=5, compile=True)
    for process in two(*flags(data, tmp_path, **sizes), f"--out_dir={tmp_path}", before=WATCH):
        assert process.wait(400) == 0, process.stderr.read()
    for rank in "01":
        events = (tmp_path / f"events{rank}").read_text().split()
        assert "backward" in events[events.index("exchange") :], events


FAILS_ON_ONE = """
if os.environ["RANK"] == "1":
    def broken(model):
        raise RuntimeError("no compiler here")
    torch.compile = broken"""


@pytest.mark.slow
def test_where_one_process_cannot_compile_none_does(data, tmp_path, capfd):
    pair = two(*flags(data, tmp_path, **STEPS | dict(max_iters=2, compile=True)), before=FAILS_ON_ONE, stdout=None)
    for process in pair:
        assert process.wait(180) == 0, process.stderr.read()
    assert "torch.compile failed on 1 of 2 processes (no compiler here): going on without it" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one(data, tmp_path):
    """One global batch in four micro-batches: gradients and losses agree to 1e-6, and each process reads half the windows."""
    knobs = dict(max_iters=1, eval_interval=1, eval_iters=3, dropout=0, dtype="float32", gradient_accumulation_steps=4)
    loss = {}
    for name, launch in (("one", lambda *a, **k: [start(*a, **k)]), ("two", two)):
        out = tmp_path / name
        out.mkdir()
        arguments = flags(data, out, **knobs)
        arguments.append(arguments.pop([a.startswith("--out_dir=") for a in arguments].index(True)))
        for process in launch(*arguments, before=SAVE_GRADIENTS):
            assert process.wait(180) == 0, process.stderr.read()
        loss[name] = [v for line in losses(map(json.loads, (out / "metrics.jsonl").open())) for v in line[1:] if v]
    one = torch.load(tmp_path / "one" / "gradients0.pt")
    for r in "01":
        for mine, theirs in zip(torch.load(tmp_path / "two" / f"gradients{r}.pt"), one, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
    assert loss["two"] == pytest.approx(loss["one"], rel=1e-6) and len(loss["one"]) == 3
    seen = {path.stem: sum(torch.load(path)) for path in tmp_path.glob("*/windows*.pt")}
    files = "one/windows0.pt", "two/windows0.pt", "two/windows1.pt"
    counts = [sum(torch.load(tmp_path / name)) - TINY["batch_size"] for name in files]  # each fetched one batch ahead
    assert counts[0] == counts[1] + counts[2] and abs(counts[1] - counts[2]) <= 2, seen


def test_accumulation_that_processes_cannot_share(data, tmp_path, monkeypatch):
    """An error before anything is written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="gradient_accumulation_steps=3 must be a multiple of the 2 processes"):
        fit(data, tmp_path, gradient_accumulation_steps=3)
    assert not os.listdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# what doesn't fit, and what is broken


def test_a_broken_checkpoint_is_never_a_fresh_start(data, tmp_path):
    """It is refused, never replaced, and the one before is offered; to take the offer works."""
    fit(data, tmp_path, **STEPS)
    contents = (tmp_path / "ckpt.pt").read_bytes()
    for broken in (None, b"", contents[: len(contents) // 2], contents[:2000] + bytes(500) + contents[2500:]):
        os.unlink(tmp_path / "ckpt.pt")
        if broken is not None:
            (tmp_path / "ckpt.pt").write_bytes(broken)
        for main, arguments in ((train.main, flags(data, tmp_path, init_from="resume", **STEPS)),
                                (sample.main, [f"--out_dir={tmp_path}", "--ckpt=ckpt.pt"])):  # fmt: skip
            with pytest.raises(UserError, match=f"mv {tmp_path}/ckpt_prev.pt {tmp_path}/ckpt.pt"):
                main(arguments)
        assert not (tmp_path / "ckpt.pt").exists() or (tmp_path / "ckpt.pt").read_bytes() == broken
        (tmp_path / "ckpt.pt").touch()
    os.replace(tmp_path / "ckpt_prev.pt", tmp_path / "ckpt.pt")  # as the message says
    assert fit(data, tmp_path, init_from="resume", **STEPS)[0]["step"] == 20


def test_a_changed_bit_of_a_checkpoint_is_found(trained, tmp_path):
    """A single bit anywhere is found, unless nothing reads it."""
    contents, expected, place = (trained / "ckpt.pt").read_bytes(), checkpoint.load(trained / "ckpt.pt"), random.Random(0)
    found = 0
    for _ in range(150):
        changed = bytearray(contents)
        changed[place.randrange(len(changed))] ^= 1 << place.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(changed)
        try:
            state = checkpoint.load(tmp_path / "ckpt.pt")
        except UserError:
            found += 1
            continue
        assert_same_tensors(state["model"], expected["model"])  # it was padding
        assert state["config"] == expected["config"]
    assert found > 100


def test_a_checkpoint_says_what_differs(data, trained, tmp_path):
    """Another model, seed, batch or text is refused with a list; the same batch in other parts is not."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "text.txt").write_text("other text\n" * 500)
    run("prepare.py", "other", "--input", tmp_path / "text.txt", "--out", tmp_path)
    same = dict(init_from="resume", n_embd=32, dropout=0)
    for knobs, words in (
        (dict(variant="NagMHA", n_embd=64), ["n_embd=32, not 64", "variant=MHA, not NagMHA", "momentum=none, not nesterov"]),
        (dict(vocab_size=300), ["vocab_size=257, not 300"]),
        (dict(batch_size=2), ["gradient_accumulation_steps=8, not 4", "batch_size * eval_iters=8, not 4"]),
        (dict(seed=1), ["seed=1337, not 1"]),
        (dict(optimizer="muon"), ["optimizer=adamw, not muon"]),
        (dict(data_dir=tmp_path, dataset="other"), ["data="]),
    ):
        with pytest.raises(UserError) as error:
            fit(data, tmp_path / "run", **same | knobs)
        assert all(word in str(error.value) for word in words) and len(str(error.value)) < 600
    state, _ = fit(data, tmp_path / "run", **same, batch_size=8, gradient_accumulation_steps=1, eval_iters=1, max_iters=61)
    assert state["step"] == 61


def test_a_checkpoint_of_another_order_of_the_data_is_not_resumed(data, trained, tmp_path):
    """An older train.py wrote it: the error says how to go on with its weights, and that works."""
    state = checkpoint.load(trained / "ckpt.pt")
    checkpoint.save(tmp_path, {k: v for k, v in state.items() if k != "order"}, best=False)
    with pytest.raises(UserError, match=f"another order, and cannot be resumed: .* --init_from={tmp_path / 'ckpt.pt'}"):
        fit(data, tmp_path, init_from="resume", n_embd=32, dropout=0, max_iters=61)
    _, metrics = fit(data, tmp_path / "new", init_from=tmp_path / "ckpt.pt", n_embd=32, dropout=0, max_iters=1)
    assert metrics[0]["val_loss"] == pytest.approx(state["best_loss"], rel=1e-3)


def test_a_checkpoint_tells_of_other_versions(data, trained, tmp_path, monkeypatch, capsys):
    """A run resumed with other software says so and goes on."""
    state = checkpoint.load(trained / "ckpt.pt")
    checkpoint.save(tmp_path, state | dict(made_with=state["made_with"] | dict(torch="1.0", commit="abc")), best=False)
    fit(data, tmp_path, init_from="resume", n_embd=32, dropout=0, max_iters=61)
    assert "torch 1.0, now" in (out := capsys.readouterr().out) and "commit abc, now" in out
    assert set(state["made_with"]) == {"python", "torch", "numpy", "hardware", "commit"}
    assert state["made_with"]["torch"] == torch.__version__


@pytest.fixture
def squares(data, tmp_path):
    """A copy of the data set to break, in small shards, and its meta."""
    out = tmp_path / "data"
    run("prepare.py", "squares", "--input", data / "text.txt", "--out", out, "--shard_tokens=1000")
    return out / "squares", json.loads((out / "squares" / "meta.json").read_text())


def test_broken_shards_are_named_before_the_first_step(squares, tmp_path):
    """Missing, cut, of another dtype or shape, with other or impossible tokens: the file is named, and no out_dir appears."""
    folder, meta = squares
    path = folder / "train_001.npy"
    contents, tokens = path.read_bytes(), np.load(path)

    def altered(i, token):
        changed = tokens.copy()
        changed[i] = token
        return changed

    for broken in (
        None, b"", contents[:100], contents[:-1], contents + b"\0", random.Random(0).randbytes(3000),
        tokens[:-1], tokens.astype(np.int64), tokens.reshape(2, -1), np.array([{}], object), altered(17, 99), altered(-1, 300),
    ):  # fmt: skip
        path.unlink()
        if isinstance(broken, bytes):
            path.write_bytes(broken)
        elif broken is not None:
            np.save(path, broken)
        with pytest.raises(UserError, match="train_001.npy .* prepare squares again"):
            fit(folder.parent, tmp_path / "out", **STEPS)
        path.touch()
    assert not (tmp_path / "out").exists()
    # a token beyond the vocabulary, in a shard whose sha256 is right
    np.save(path, altered(5, 257))
    meta["shards"]["train"][1]["sha256"] = shards.sha256(path)
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="train_001.npy holds a token 257, meta.json states vocab_size 257"):
        fit(folder.parent, tmp_path / "out", **STEPS)


def test_large_data_is_verified_by_sample_or_whole(squares, tmp_path, monkeypatch):
    """Large data by another sample each time, or all of it with --verify."""
    folder, meta = squares
    hashed = []
    real = shards.sha256
    monkeypatch.setattr(shards, "sha256", lambda path: hashed.append(path) or real(path))
    monkeypatch.setattr(shards, "SAMPLE", 3000)  # a shard and a half
    files = sum(map(len, meta["shards"].values()))
    assert files == 4
    drawn = set()
    for _ in range(30):
        hashed.clear()
        shards.verify(folder)
        assert len(hashed) in (2, 3)  # the last one is short
        drawn |= set(hashed)
    assert len(drawn) == 4  # none is left out for ever
    hashed.clear()
    train.main(flags(folder.parent, tmp_path / "out", max_iters=0) + ["--verify"])
    assert len(hashed) == 4


# ----------------------------------------------------------------------------------------------------------------------
# a machine that lacks something


def test_disk_full(data, whole, tmp_path):
    """A limit on the size of files acts as one: the checkpoint doesn't fit, or a line of metrics doesn't."""
    fit(data, tmp_path, **STEPS | dict(max_iters=8))  # saved at 0 and 8
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    for limit in ((tmp_path / "ckpt.pt").stat().st_size // 2, (tmp_path / "metrics.jsonl").stat().st_size + 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with pytest.raises(UserError, match="[Ff]ree some space"):
                train.main(flags(data, tmp_path, init_from="resume", **STEPS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert kept == {path: path.read_bytes() for path in tmp_path.glob("*.pt")} and len(kept) == 3
        assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "ckpt_prev.pt", "best.pt", "metrics.jsonl", "lock"}
    assert_same_run(tmp_path, data, whole)


def test_a_folder_that_cannot_be_written(data):
    """One line that says what to choose instead."""
    for folder in ("/proc/nothing", data / "text.txt"):
        with pytest.raises(UserError, match="cannot write to out_dir=.*choose another --out_dir"):
            fit(data, folder, **STEPS)


def test_without_cuda_or_bfloat16_the_run_goes_on_and_says_so(data, trained, tmp_path, monkeypatch, capsys):
    """Each fallback is said once, by train.py and by sample.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    fit(data, tmp_path, device="cuda", dtype="bfloat16", max_iters=2)
    out = capsys.readouterr().out
    assert out.count("going on with the CPU") == 1 and out.count("going on with float32") == 1 and "cpu float32" in out
    sample.main([f"--out_dir={trained}", "--device=cuda", "--start=17 times", "--max_new_tokens=1"])
    captured = capsys.readouterr()
    assert captured.err.count("going on with the CPU") == 1 and captured.out.startswith("17 times")


@pytest.mark.slow
def test_without_a_real_compiler(data, tmp_path):
    """The run goes on uncompiled."""
    env = dict(CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    process = start(*flags(data, tmp_path, **TINY | dict(max_iters=2, compile=True)), **env)
    assert process.wait(200) == 0, process.stderr.read()
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 2


@pytest.mark.slow
def test_out_of_memory(data, tmp_path):
    """One line that names the knobs to change and how."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))"
    process = start(*flags(data, tmp_path, n_embd=2048, batch_size=20_000, eval_iters=1, **STEPS), before=limit)
    assert process.wait(120) == 1
    error = process.stderr.read()
    assert "error: out of memory: lower batch_size=20000 and raise gradient_accumulation_steps=2, eval_iters=1" in error
    assert "Traceback" not in error


def test_deterministic_runs_are_the_same_run(data, tmp_path, monkeypatch):
    """Two runs of one seed have the same losses to the bit, one of another seed has not."""
    seen = []
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or rate(*a)
    )
    runs = [fit(data, tmp_path / name, deterministic=True, max_iters=6, seed=3) for name in "ab"]
    assert losses(runs[0][1]) == losses(runs[1][1]) and all(seen)
    other = fit(data, tmp_path / "c", max_iters=6, seed=4)
    assert losses(other[1]) != losses(runs[0][1]) and not seen[-1]


# ----------------------------------------------------------------------------------------------------------------------
# anything at all

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain, max_size=3)
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
some = settings(many, max_examples=50)
names = st.sampled_from(list(train.Config.__dataclass_fields__)) | st.text(max_size=12)


def only_user_errors(action):
    """The action succeeds or raises a UserError that fits on a screen."""
    try:
        action()
    except UserError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 21 and max(map(len, lines)) <= 1000


@many
@given(st.dictionaries(names, values.map(lambda v: v if v == v else "nan"), max_size=30), st.lists(st.text(max_size=30)))
def test_any_configuration(tmp_path_factory, knobs, arguments):
    """On the command line, and as TOML where it can be written."""
    for cls in (train.Config, sample.Config):
        only_user_errors(lambda cls=cls: parse(cls, [f"--{k}={v}" for k, v in knobs.items()] + arguments))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("".join(f"{json.dumps(k)} = {json.dumps(v)}\n" for k, v in knobs.items()
                            if isinstance(v, bool | int | float | str | list)), errors="replace")  # fmt: skip
    only_user_errors(lambda: parse(train.Config, [str(path)]))
    path.write_bytes(repr(knobs).encode(errors="replace"))
    only_user_errors(lambda: parse(train.Config, [str(path)]))


def paths(tree, prefix=()):
    """Where something lies in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def broken(tree, path, value):
    """The tree with something else at a path; without it where the value is None."""
    key, *rest = path
    tree = tree.copy()
    if rest:
        tree[key] = broken(tree[key], rest, value)
    elif value is None:
        del tree[key]
    else:
        tree[key] = value
    return tree


@pytest.mark.parametrize("choice", ["momentum", "energy", "learned", "inner_steps"])
def test_a_choice_of_the_wrong_type_in_a_checkpoint(choice, trained, tmp_path):
    state = checkpoint.load(trained / "ckpt.pt")
    torch.save(state | dict(model_config=state["model_config"] | {choice: [["a"]]}), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt does not fit: "):
        checkpoint.load_model(tmp_path / "ckpt.pt")


@some
@given(st.data())
def test_any_checkpoint(data, trained, tmp_path_factory, draw):
    """With a field missing or replaced, an error says so or a step can be taken. Sampling leaves the file as it was."""
    state = checkpoint.load(trained / "ckpt.pt")
    folder = tmp_path_factory.mktemp("any")
    path = draw.draw(st.sampled_from([p for p in paths(state) if p[0] != "made_with" or len(p) == 1]))
    value = draw.draw(values | st.just(torch.zeros(3)))
    torch.save(broken(state, path, value), folder / "ckpt.pt")
    contents = (folder / "ckpt.pt").read_bytes()
    knobs = dict(n_embd=32, dropout=0, max_iters=61, eval_interval=1000, init_from="resume")
    only_user_errors(lambda: sample.main([f"--out_dir={folder}", "--ckpt=ckpt.pt", "--max_new_tokens=1"]))
    assert (folder / "ckpt.pt").read_bytes() == contents
    only_user_errors(lambda: train.main(flags(data, folder, **knobs)))


@some
@given(st.data())
def test_any_meta(data, tmp_path_factory, draw):
    """A meta.json with something missing or replaced gives an error for users, or trains."""
    folder = tmp_path_factory.mktemp("any") / "squares"
    shutil.copytree(data / "squares", folder)
    meta = json.loads((folder / "meta.json").read_text())
    value = draw.draw(values)
    (folder / "meta.json").write_text(json.dumps(broken(meta, draw.draw(st.sampled_from(list(paths(meta)))), value)))
    only_user_errors(lambda: train.main(flags(folder.parent, folder / "out", max_iters=0)))


@some
@given(st.binary(max_size=300), st.integers(0, 3000), st.sampled_from(["train_000.npy", "meta.json"]))
def test_any_bytes_in_a_data_set(data, tmp_path_factory, noise, place, name):
    """Bytes changed anywhere in a shard are found."""
    folder = tmp_path_factory.mktemp("any") / "squares"
    shutil.copytree(data / "squares", folder)
    contents = (folder / name).read_bytes()
    place %= len(contents)
    changed = contents[:place] + noise + contents[place + len(noise) :]
    (folder / name).write_bytes(changed)
    if changed != contents and name != "meta.json":
        with pytest.raises(UserError, match="train_000.npy"):
            shards.verify(folder)
    only_user_errors(lambda: train.main(flags(folder.parent, folder / "out", max_iters=0)))
