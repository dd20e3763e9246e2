"""What a run of train.py and sample.py promises, with tiny models."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import checkpoint
import sample
import train
from configurator import parse
from conftest import REVERSIBLE, ROOT, SHARED, TINY, assert_same_tensors, fit, flags, losses, needs, run, save_run, tiny
from data import get_tokenizer
from experiments import plot
from guard import UserError
from model import ENERGIES, GPT, VARIANTS, GPTConfig


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_learns_and_says_so(data, tmp_path, optimizer):
    """Losses fall, every number of metrics.jsonl is there, and the validation loss is that of the saved weights."""
    state, metrics = fit(data, tmp_path, max_iters=60, eval_interval=20, optimizer=optimizer, variant="NagMHA")
    trained, evaluated = ([m for m in metrics if key in m] for key in ("train_loss", "val_loss"))
    assert [m["step"] for m in evaluated] == [0, 20, 40, 60] and [m["step"] for m in trained] == list(range(60))
    assert evaluated[0]["val_loss"] == pytest.approx(math.log(257), rel=0.03)
    assert evaluated[-1]["val_loss"] < 2.6 and trained[-1]["train_loss"] < 2.6
    assert trained[-1]["tokens"] == evaluated[-1]["tokens"] == 60 * 8 * 32
    for key in ("lr", "grad_norm", "tokens_per_second", "memory_gb", "seconds"):
        assert trained[-1][key] > 0
    # a byte is a token here; the end of the one document is one more
    assert evaluated[-1]["val_bits_per_byte"] == pytest.approx(evaluated[-1]["val_loss"] / math.log(2), rel=0.01)
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["best_loss"] == min(m["val_loss"] for m in evaluated)
    # the validation loss is that of the saved weights, in full precision as well
    model = GPT(GPTConfig(**state["model_config"])).eval()
    model.load_state_dict(state["model"])
    split = train.Split(data / "squares", "val", 32)
    x, y = map(torch.from_numpy, split.windows(split.fixed(8)))
    assert model(x, y)[1].item() == pytest.approx(evaluated[-1]["val_loss"], rel=0.01)


RUNS = {variant: dict(variant=variant) for variant in VARIANTS} | dict(reversible=REVERSIBLE, muon=dict(optimizer="muon"))


@pytest.mark.parametrize("choices", RUNS.values(), ids=RUNS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(data, tmp_path, choices):
    """Weights, optimizer and losses bitwise, with dropout, across the edge of an epoch, stopped twice."""
    knobs = choices | dict(eval_interval=7, lr_decay_iters=20)
    whole, expected = fit(data, tmp_path / "whole", max_iters=20, **knobs)
    for start, max_iters in (("scratch", 7), ("resume", 14), ("resume", 20)):
        parts, metrics = fit(data, tmp_path / "parts", max_iters=max_iters, init_from=start, **knobs)
    assert_same_tensors(parts["model"], whole["model"])
    for mine, theirs in zip(parts["optimizers"], whole["optimizers"], strict=True):
        assert_same_tensors(mine["state"], theirs["state"])
    assert parts["scaler"] == whole["scaler"] and losses(metrics) == losses(expected)


def test_every_step_draws_its_own_random_numbers(data, tmp_path, monkeypatch):
    """torch's seed depends on the step and on the run's seed, and on nothing else."""
    seeds, rate = [], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *a: seeds.append(torch.initial_seed()) or rate(*a))
    for name, knobs in dict(a={}, again={}, other=dict(seed=4)).items():
        fit(data, tmp_path / name, max_iters=5, **knobs)
    assert seeds[:5] == seeds[5:10] and len(set(seeds)) == 10


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(data, tmp_path):
    """torchrun with gloo, against one process with the same global batch; and compiled, against not."""
    knobs = dict(max_iters=5, eval_interval=5, dropout=0, dtype="float32")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, launcher, extra in (
        ("one", (sys.executable,), {}),
        ("two", torchrun, {}),
        ("compiled", (sys.executable,), dict(compile=True)),
    ):
        run("train.py", *flags(data, tmp_path / name, **knobs | extra), launcher=launcher)
    one, *others = (checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("one", "two", "compiled"))
    for other in others:
        torch.testing.assert_close(one["model"], other["model"], rtol=1e-4, atol=2e-5)
        assert other["best_loss"] == pytest.approx(one["best_loss"], rel=1e-5)


def test_the_readmes_two_processes_do_what_one_does():
    """The global batch, and as many windows for the validation loss, as config/demo.toml alone."""
    (command,) = re.findall(r"torchrun .*train.py (config/demo.toml .*)", (ROOT / "README.md").read_text())
    one, two = (parse(train.Config, command.split()[:n]) for n in (1, None))
    for field in ("gradient_accumulation_steps", "eval_iters"):
        assert getattr(one, field) * one.batch_size == getattr(two, field) * two.batch_size


def test_a_stopped_evaluation_promises_no_checkpoint(data, trained, tmp_path, monkeypatch, capsys):
    """A signal ends an evaluation, which saves nothing that one could resume."""
    monkeypatch.setattr(train, "evaluate", lambda *_: (1.0, True))
    train.main(flags(data, tmp_path, init_from=trained / "ckpt.pt", n_embd=32, eval_only=True))
    assert "resume" not in capsys.readouterr().out


@pytest.mark.parametrize("init_from", ["resume", "ckpt.pt", "scratch"])
def test_an_evaluation_only_reads(data, trained, tmp_path, capsys, init_from):
    """It says the loss that the weights had, in a folder that cannot be written, and nothing in there changes."""
    donor = checkpoint.load(trained / "ckpt.pt")
    shutil.copytree(trained, tmp_path / "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run").chmod(0o500)
    start = tmp_path / "run" / init_from if init_from == "ckpt.pt" else init_from
    train.main(flags(data, tmp_path / "run", init_from=start, n_embd=32, dropout=0, eval_only=True))
    loss = float(re.search(r"validation loss ([\d.]+)", capsys.readouterr().out)[1])
    assert (loss == pytest.approx(donor["best_loss"], rel=1e-3)) == (init_from != "scratch")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()} == before


def test_metrics_outlive_a_run_that_does_not_start(data, trained, tmp_path, monkeypatch):
    """From scratch, in the folder of an earlier run: no tracker, no memory, a loss that is not finite."""
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    knobs = dict(max_iters=60, n_embd=32)
    with pytest.raises(UserError, match="pip install wandb"):
        fit(data, tmp_path / "run", logger="wandb", **knobs)

    def out_of_memory(*_, **__):
        raise MemoryError

    for name, forward in (
        ("out of memory", out_of_memory),
        ("validation loss is nan", lambda *_: (None, torch.tensor(math.nan))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("device.flops_per_token", lambda model: 1.0)
            patch.setattr(GPT, "forward", forward)
            with pytest.raises(UserError, match=name):
                fit(data, tmp_path / "run", **knobs)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_tracker_goes_on_with_one_run(data, tmp_path, monkeypatch):
    """A stand-in for wandb: after a resume the same id, in the project asked for; its refusal is one line."""
    started, ended = [], []
    wandb = types.SimpleNamespace(init=lambda **a: started.append(a), log=lambda *a, **k: None, finish=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    knobs = dict(logger="wandb", logger_project="mine", eval_interval=2)
    for init_from, steps in (("scratch", 2), ("resume", 4), ("scratch", 6)):
        fit(data, tmp_path, max_iters=steps, init_from=init_from, **knobs)
    first, again, other = (a["id"] for a in started)
    assert first == again != other and started[1]["resume"] == "allow" and len(ended) == 3
    assert (started[0]["project"], started[0]["name"]) == ("mine", str(tmp_path))

    def no_key(**_):
        raise RuntimeError("no API key")

    wandb.init = no_key
    with pytest.raises(UserError, match="logger=wandb does not start .no API key"):
        fit(data, tmp_path, max_iters=8, **knobs)


def test_a_longer_run_is_not_replaced_unasked(data, trained, tmp_path):
    """A run from scratch, or from other weights, says what is there; --overwrite replaces it."""
    shutil.copytree(trained, tmp_path / "run")
    for init_from in ("scratch", trained / "ckpt.pt"):
        with pytest.raises(UserError, match="holds a run of 60 steps, this one has 5: .*--overwrite"):
            fit(data, tmp_path / "run", max_iters=5, n_embd=32, init_from=init_from)
    assert checkpoint.load(tmp_path / "run" / "ckpt.pt")["step"] == 60
    state, metrics = fit(data, tmp_path / "run", max_iters=5, n_embd=32, overwrite=True)
    assert state["step"] == metrics[-1]["step"] == 5


def test_sizes_that_the_weights_do_not_have_are_refused(data, trained, tmp_path):
    """Where they stand on the command line; those of a file give way."""
    with pytest.raises(UserError, match="n_layer=6, not 2; n_embd=16, not 32: leave them out"):
        fit(data, tmp_path / "out", init_from=trained / "ckpt.pt", n_layer=6)
    (tmp_path / "sizes.toml").write_text("n_layer = 6\nn_head = 2\nn_embd = 16\n")
    arguments = [f for f in flags(data, tmp_path / "out", init_from=trained / "ckpt.pt", max_iters=1) if "n_" not in f]
    train.main([str(tmp_path / "sizes.toml"), *arguments])
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["model_config"]["n_layer"] == 2


def test_without_a_compiler_the_run_goes_on(data, tmp_path, monkeypatch, capsys):
    """And says so once."""

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    state, _ = fit(data, tmp_path, max_iters=1, compile=True)
    assert state["step"] == 1 and capsys.readouterr().out.count("no compiler here") == 1


@pytest.mark.parametrize("variant, then, words", [
    ("MHA", {}, None),
    ("MHA2nd1st", dict(learned=""), None),  # which learned tau, whatever its configuration said
    ("TMMFormer", dict(momentum="triple", learned="beta gamma mu"), None),  # which learned eta
    ("NagMHA", dict(curvature="light", tau=0.0), None),  # a curvature that did nothing
    ("LinearMHA", {}, "whose linear attention ended in a norm"),
    ("CEM+", {}, "whose tied MLP took a single inner step"),
    ("PolyakFormer", dict(variant="VerletFormer", momentum="verlet"), "whose VerletFormer kicked and drifted in another order"),
    ("PolyakFormer", dict(variant="IMEXFormer", momentum="imex"), "whose IMEXFormer had its friction implicit"),
])  # fmt: skip
def test_checkpoints_of_an_earlier_version(tmp_path, variant, then, words):
    """Load as the function that they were, or are refused with the reason."""
    model, idx = tiny(variant, noise=0.1), torch.arange(9)[None]
    config = {k: v for k, v in asdict(model.config).items() if k not in ("tau", "implicit_steps", "backbone")} | then
    weights = {name: p for name, p in model.state_dict().items() if "mlp.eta" not in name}
    checkpoint.save(tmp_path, dict(model=weights, model_config=config, tokenizer="bytes", step=7), best=False)
    if words is None:
        loaded, state = checkpoint.load_model(tmp_path / "ckpt.pt")
        assert torch.equal(loaded(idx)[0], model(idx)[0]) and state["model_config"] == asdict(model.config)
    else:
        with pytest.raises(UserError, match=f"ckpt.pt is of an earlier version, {words}.*: train it again"):
            checkpoint.load_model(tmp_path / "ckpt.pt")


def test_a_run_that_takes_no_step_does_not_compile(data, trained, tmp_path, monkeypatch):
    """An evaluation, and a resumed run that is at its end."""
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    shutil.copytree(trained, tmp_path / "run")
    for knobs in (dict(eval_only=True), dict(max_iters=60)):
        train.main(flags(data, tmp_path / "run", init_from="resume", n_embd=32, dropout=0, eval_interval=60, compile=True) +
                   [f"--{k}={v}" for k, v in knobs.items()])  # fmt: skip


def test_no_gradient_of_the_logits():
    """The backward pass of a compiled step is given the gradient of the loss and nothing else."""
    given = []

    def backward(graph, inputs):
        given.extend(n.meta["val"].shape for n in graph.graph.nodes if n.op == "placeholder" and "tangents" in n.target)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)
    model, idx = tiny(), torch.randint(257, (2, 8))
    torch.compile(train.Loss(model), backend=backend)(idx, idx).backward()
    assert given == [torch.Size([])] and model.lm_head.weight.grad is not None


def test_optimizer_groups_cover_every_parameter_once():
    """Matrices decay, biases, norms and scalars do not, and scalars have their own rate."""
    model = GPT(
        GPTConfig(
            variant="NagMHA", curvature="light", learned="beta eta", **{k: TINY[k] for k in ("n_layer", "n_head", "n_embd")}
        )
    )
    for optimizer in ("adamw", "muon"):
        cfg = parse(train.Config, [f"--optimizer={optimizer}", "--scalar_learning_rate=6e-5"])
        groups = [g for opt in train.optimizers(model, cfg, "cpu") for g in opt.param_groups]
        names = {p: n for n, p in model.named_parameters()}
        assert sorted(names[p] for g in groups for p in g["params"]) == sorted(names.values())
        for g in groups:
            for p in g["params"]:
                scalar = names[p].endswith("raw")
                assert g["peak"] == pytest.approx(0.1 if scalar else 1)
                assert (g["weight_decay"] > 0) == (p.dim() == 2 and not scalar)
        assert (optimizer == "muon") == any("c_fc" in names[p] for p in groups[-1]["params"] if len(groups) == 4)


@pytest.mark.parametrize("variant, stacked", [
    ("MHA", {"attn.c_attn.weight": 3}),
    ("Llama", {"attn.c_attn.weight": 3, "mlp.c_fc.weight": 2}),
    ("CEM", {"attn.c_attn.weight": 2, "mlp.c_fc.weight": 2}),
])  # fmt: skip
def test_muon_updates_each_stacked_matrix_by_itself(variant, stacked, monkeypatch):
    """As torch's Muon updates the same matrices in parameters of their own."""
    monkeypatch.setattr(train, "short_dtype", lambda kind: "bfloat16")  # as torch's, on any processor
    model, cfg = tiny(variant), parse(train.Config, ["--optimizer=muon"])
    matrices = {name: p for name, p in model.transformer.h[0].named_parameters() if p.dim() == 2}
    apart = {name: [part.detach().clone() for part in p.chunk(stacked.get(name, 1))] for name, p in matrices.items()}
    parts, knobs = [part for parts in apart.values() for part in parts], dict(adjust_lr_fn="match_rms_adamw")
    muon, reference = train.optimizers(model, cfg, "cpu")[1], torch.optim.Muon(parts, weight_decay=cfg.weight_decay, **knobs)
    for _ in range(2):
        model.zero_grad()
        model(*[torch.randint(257, (2, 8))] * 2)[1].backward()
        for name, p in matrices.items():
            for part, gradient in zip(apart[name], p.grad.chunk(len(apart[name])), strict=True):
                part.grad = gradient.clone()
        muon.step(), reference.step()
    for name, p in matrices.items():
        torch.testing.assert_close(p.detach(), torch.cat(apart[name]))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_muon_multiplies_in_float32_where_bfloat16_is_slow(shape, monkeypatch):
    """Its step is then -0.2 sqrt(larger side) U f(S) V^T to float32's precision, f the polynomial five times."""
    monkeypatch.setattr(train, "short_dtype", lambda kind: "float32")
    p, gradient = torch.nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    p.grad = gradient.clone()
    train.Muon([dict(params=[p], stacked=[1])], lr=1.0).step()
    U, S, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    torch.testing.assert_close(p.detach().double(), -0.2 * 24**0.5 * U @ S.diag() @ Vh, rtol=1e-4, atol=1e-5)


def test_learning_rate_schedule():
    """nanoGPT's: linear warm-up, a cosine down to min_lr, and then min_lr; or a constant."""
    cfg = parse(train.Config, ["--warmup_iters=10", "--max_iters=110", "--learning_rate=1", "--min_lr=0.1"])
    rates = [train.learning_rate(step, cfg) for step in range(130)]
    assert rates[:11] == pytest.approx([(i + 1) / 11 for i in range(11)]) and max(rates) == rates[10] == 1
    assert rates[60] == pytest.approx(0.55) and all(rate == pytest.approx(0.1) for rate in rates[110:])
    assert {train.learning_rate(s, parse(train.Config, ["--decay_lr=False"])) for s in range(99)} == {6e-4}


@pytest.mark.parametrize("knobs, words", [
    ("--learning_rate=1e-5", "min_lr=6e-05 must not exceed learning_rate=1e-05"),
    ("--lr_decay_iters=0", "lr_decay_iters=0 must be at least 1"),
    ("--lr_decay_iters=-5", "lr_decay_iters=-5 must be at least 1"),
    ("--lr_decay_iters=100 --warmup_iters=100", "lr_decay_iters=100 must come after warmup_iters=100"),
    ("--scalar_learning_rate=-1", "scalar_learning_rate=-1.0 must be positive"),
    ("--scalar_learning_rate=nan", "scalar_learning_rate=nan must be positive"),
    ("--variant=HuberMHA --delta=inf", "delta=inf must be positive and finite"),
])  # fmt: skip
def test_schedules_that_make_no_sense_are_refused(knobs, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(train.Config, knobs.split())
    parse(train.Config, ["--decay_lr=False", "--learning_rate=1e-5"])  # a constant rate needs no min_lr


def test_a_warm_up_that_does_not_end_is_said(data, tmp_path, capsys):
    fit(data, tmp_path, max_iters=3)
    assert capsys.readouterr().out.count("warmup_iters=3 does not end before max_iters=3") == 1


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2's weights


@pytest.fixture
def gpt2_folder(tmp_path):
    """A function that writes a small GPT-2 as transformers does, with changes to its configuration, and returns both."""
    transformers = pytest.importorskip("transformers")

    def write(**changes):
        sizes = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=300, activation_function="gelu")
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)).eval()
        theirs.save_pretrained(tmp_path / "gpt2")
        return tmp_path / "gpt2", theirs

    return write


def test_released_weights_load_through_transformers(data, tmp_path, gpt2_folder):
    """A folder that transformers wrote gives the loss that transformers computes."""
    folder, theirs = gpt2_folder()
    state, metrics = fit(data, tmp_path / "out", init_from=folder, any_tokenizer=True, max_iters=1, dtype="float32")
    split = train.Split(data / "squares", "val", 32)
    x, y = map(torch.from_numpy, split.windows(split.fixed(8)))
    loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert metrics[0]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("change", [
    dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False), dict(activation_function="relu"),
    dict(n_inner=32), dict(tie_word_embeddings=False), dict(layer_norm_epsilon=1e-3),
], ids=str)  # fmt: skip
def test_released_weights_of_another_function_are_refused(gpt2_folder, change):
    """With the entry of config.json that changes it."""
    (name, value), (folder, _) = *change.items(), gpt2_folder(**change)
    with pytest.raises(UserError, match=f"{name}={value}, not "):
        checkpoint.gpt2(str(folder))


def test_released_weights_write_no_text_with_an_illegal_choice(gpt2_folder):
    folder, _ = gpt2_folder()
    with pytest.raises(UserError, match="n_loop=0 must be at least 1"):
        sample.main([f"--init_from={folder}", "--n_loop=0", "--start=a"])


@needs("tiktoken_cache")
def test_gpt2_is_fine_tuned_as_another_system(tmp_path, gpt2_folder):
    """The config for it, with a small GPT-2 of random weights: the same loss as GPT-2 at first, and tau leaves 0."""
    folder, theirs = gpt2_folder(vocab_size=50257)
    (tmp_path / "input.txt").write_text("To be, or not to be: that is the question.\n" * 200)
    run("prepare.py", "play", "--input", tmp_path / "input.txt", "--tokenizer", "gpt2", "--out", tmp_path)
    knobs = dict(init_from=folder, data_dir=tmp_path, dataset="play", out_dir=tmp_path / "out", block_size=32, compile=False,
                 dtype="float32", eval_iters=2, max_iters=3, eval_interval=3)  # fmt: skip
    train.main(["config/finetune_shakespeare.toml", *(f"--{k}={v}" for k, v in knobs.items())])
    state = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["val_loss"]
    split = train.Split(tmp_path / "play", "val", 32)
    x, y = map(torch.from_numpy, split.windows(split.fixed(2)))
    assert first == pytest.approx(
        torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item(), rel=1e-4
    )
    assert state["model_config"]["curvature"] == "light" and state["model"]["transformer.h.0.attn.tau.raw"].abs().min() > 0


def test_weights_of_another_tokenizer_are_refused(data, trained, tmp_path, gpt2_folder):
    """With both names, whatever the sizes, unless they are asked for."""
    folder, _ = gpt2_folder(vocab_size=50257)
    state = checkpoint.load(trained / "ckpt.pt")
    checkpoint.save(tmp_path, state | dict(tokenizer="cl100k_base"), best=False)
    for donor, name in ((folder, "gpt2"), (tmp_path / "ckpt.pt", "cl100k_base")):
        with pytest.raises(UserError, match=f"has the tokenizer {name}, the text has bytes: .* --tokenizer {name}"):
            fit(data, tmp_path / "out", init_from=donor, max_iters=1)
    assert not (tmp_path / "out").exists()
    fit(data, tmp_path / "out", init_from=tmp_path / "ckpt.pt", n_embd=32, max_iters=1, any_tokenizer=True)


@pytest.mark.parametrize("learned", ["", "temperature"])
def test_a_learned_temperature_outlives_surgery(learned):
    donor = tiny(learned="temperature", temperature=0.5, noise=1.0)
    config = GPTConfig("NagMHA", block_size=16, learned=learned)
    config, weights = checkpoint.surgery(config, asdict(donor.config), donor.state_dict())
    new = GPT(config).eval()
    new.load_state_dict(weights, strict=False)
    idx = torch.arange(16)[None]
    torch.testing.assert_close(new(idx, idx)[0], donor(idx, idx)[0])


def test_another_temperature_is_another_function():
    """Also than that of weights which are older than the knob."""
    donor = tiny()
    old = {k: v for k, v in asdict(donor.config).items() if k != "temperature"}
    for config in asdict(donor.config), checkpoint.renewed("ckpt.pt", old, donor.state_dict()):
        with pytest.raises(UserError, match="surgery cannot change its temperature; take --temperature=1.0"):
            checkpoint.surgery(GPTConfig(temperature=0.5, block_size=32), config, donor.state_dict())


SURGEONS = {name: dict(variant=name) for name in ("MHA2nd1st", "LightMHA2nd1st", "MomenMHA", "NagMHA")}
SURGEONS["temperature"] = dict(learned="temperature")
SURGEONS["both"] = dict(variant="NagMHA", curvature="light", momentum_on="both")


@pytest.mark.parametrize("choices", SURGEONS.values(), ids=SURGEONS)
def test_surgery_keeps_the_function_and_trains_on(data, trained, tmp_path, choices):
    """A trained MHA as another system: the same logits, and its new scalars leave where they start."""
    donor = checkpoint.load(trained / "ckpt.pt")
    config, weights = checkpoint.surgery(GPTConfig(**choices, block_size=32), donor["model_config"], donor["model"])
    old, new = GPT(GPTConfig(**donor["model_config"])).eval(), GPT(config).eval()
    old.load_state_dict(donor["model"])
    assert set(new.load_state_dict(weights, strict=False).missing_keys) == {n for n in new.state_dict() if n.endswith(".raw")}
    idx = torch.arange(32)[None]
    torch.testing.assert_close(new(idx, idx)[0], old(idx, idx)[0], rtol=0, atol=1e-5)
    state, metrics = fit(data, tmp_path, init_from=trained / "ckpt.pt", max_iters=5, n_embd=32, dtype="float32",
                         scalar_learning_rate=0.1, dropout=0, **choices)  # fmt: skip
    assert metrics[0]["val_loss"] == pytest.approx(donor["best_loss"], rel=0.01)
    moved = {n: p.abs().max() for n, p in state["model"].items() if n.endswith(".raw")}  # from tau = 0, from beta = 0
    moved.pop("transformer.h.0.rules.0.beta.raw", None)  # the first velocity is zero
    assert moved and min(moved.values()) > 0.003


@pytest.mark.parametrize(
    "shared", [dict(backbone="llama", qk_norm=True), dict(backbone="llama", tied=True), dict(energy="linear")], ids=str
)
def test_surgery_on_other_systems(shared):
    """Whatever has neither momentum nor curvature can take them: at first they change nothing."""
    donor, idx = tiny(**shared, noise=0.1), torch.arange(9)[None]
    curvature = "none" if "tied" in shared or "energy" in shared else "newton"
    asked = GPTConfig(variant="NagMHA", curvature=curvature, block_size=donor.config.block_size, **shared)
    config, weights = checkpoint.surgery(asked, asdict(donor.config), donor.state_dict())
    new = GPT(config).eval()
    new.load_state_dict(weights, strict=False)
    assert "beta" in config.learned
    torch.testing.assert_close(new(idx, idx)[0], donor(idx, idx)[0], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="surgery cannot change its"):
        checkpoint.surgery(GPTConfig(variant="NagMHA", block_size=donor.config.block_size), asdict(donor.config), {})
    with pytest.raises(UserError, match="extra tables"):
        checkpoint.surgery(asked, asdict(tiny("EmbedControl").config), {})


def test_a_checkpoint_of_the_older_muon_is_not_resumed(data, tmp_path):
    """Its momenta have the same shapes and mean another update."""
    fit(data, tmp_path, max_iters=2, optimizer="muon")
    state = checkpoint.load(tmp_path / "ckpt.pt")
    del state["optimizers"][-1]["param_groups"][0]["stacked"]
    checkpoint.save(tmp_path, state, best=False)
    with pytest.raises(UserError, match="whose Muon took q, k and v for one matrix, and cannot be resumed"):
        fit(data, tmp_path, max_iters=4, optimizer="muon", init_from="resume")


def test_surgery_refuses_what_would_change_the_function(data, trained, tmp_path):
    """With the reason; and a system takes its own weights."""
    for choices, words in (
        (dict(variant="YuriiFormer"), "cannot start as MHA"),
        (dict(variant="LinearMHA"), "cannot start as MHA"),
        (dict(variant="YuriiFormer", velocity_init="zero", velocity_norm=False), "looks ahead by mu=0.9, also at beta=0"),
        (dict(block_size=64), "32 positions"),
    ):
        with pytest.raises(UserError, match=words):
            fit(data, tmp_path, init_from=trained / "ckpt.pt", n_embd=32, **choices)
    fit(data, tmp_path / "nag", variant="NagMHA", max_iters=1)
    with pytest.raises(UserError, match="reversible=True divides by beta=0"):
        fit(data, tmp_path, init_from=trained / "ckpt.pt", n_embd=32, **REVERSIBLE)
    with pytest.raises(UserError, match="NagMHA cannot become MHA .*momentum"):
        fit(data, tmp_path, init_from=tmp_path / "nag" / "ckpt.pt")
    again, metrics = fit(data, tmp_path / "again", variant="NagMHA", init_from=tmp_path / "nag" / "ckpt.pt", max_iters=1)
    assert again["model_config"]["beta"] == 0.9  # the same system: its weights, and a new run
    fit(data, tmp_path / "light", variant="LightMHA2nd1st", init_from=trained / "ckpt.pt", n_embd=32, max_iters=2)
    start = dict(variant="LightMHA2nd1st", init_from=tmp_path / "light" / "ckpt.pt", n_embd=32, max_iters=0)
    light, _ = fit(data, tmp_path / "go_on", **start)  # whose tau was learned from 0, the variant's from 1
    assert_same_tensors(light["model"], checkpoint.load(start["init_from"])["model"])
    looped, _ = fit(data, tmp_path / "loop", variant="NagMHA", n_loop=2, init_from=tmp_path / "nag" / "ckpt.pt", max_iters=1)
    assert looped["model_config"]["n_loop"] == 2


def nanogpts(path, model, prefix="_orig_mod.", **args):
    """Save a model as nanoGPT does, and return the path."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    weights = {prefix + k: v for k, v in model.state_dict().items()}
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # the mask, in old versions
    args = {k: getattr(model.config, k) for k in sizes} | args
    torch.save(dict(model=weights, model_args=args, iter_num=7, best_val_loss=np.float64(1.0), config={}), path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_a_checkpoint_of_nanogpt_loads(data, tmp_path, prefix):
    """Its names, compiled or distributed or neither, with a loss from numpy and an argument that only a descendant has."""
    ours = tiny(vocab_size=50304, n_embd=4)
    donor = nanogpts(tmp_path / "n.pt", ours, prefix, window="sliding")
    knobs = dict(variant="NagMHA", any_tokenizer=True, max_iters=1, dtype="float32", n_embd=4)
    _, metrics = fit(data, tmp_path, init_from=donor, **knobs)
    split = train.Split(data / "squares", "val", 32)
    x, y = map(torch.from_numpy, split.windows(split.fixed(8)))
    assert metrics[0]["val_loss"] == pytest.approx(ours(x, y)[1].item(), rel=1e-4)


def test_a_character_level_model_of_nanogpt_is_refused(tmp_path):
    """With the reason: its 65 characters are nowhere in the file."""
    with pytest.raises(UserError, match="65 tokens that are not GPT-2's.* pickle"):
        checkpoint.load(nanogpts(tmp_path / "n.pt", tiny(vocab_size=65)))


def test_nanogpts_checkpoints_are_no_runs_of_ours(data, tmp_path, capsys):
    """To resume one is refused with the remedy; sampling takes it by its name, and says where a checkpoint is."""
    nanogpts(tmp_path / "ckpt.pt", tiny(vocab_size=50304, n_embd=4))
    with pytest.raises(UserError, match="is nanoGPT's, and cannot be resumed: .*--init_from="):
        fit(data, tmp_path, init_from="resume")
    with pytest.raises(UserError, match="no checkpoint at .*best.pt, only .*ckpt.pt: take that one .*--ckpt=ckpt.pt"):
        sample.main([f"--out_dir={tmp_path}"])
    sample.main([f"--init_from={tmp_path / 'ckpt.pt'}", "--start=a", "--max_new_tokens=1"])
    assert capsys.readouterr().out.startswith("a")


def test_a_device_that_cannot_be_used_is_named(data, trained, tmp_path, monkeypatch):
    """By every program, and never as a broken checkpoint."""
    knobs = ["--start=a", "--max_new_tokens=1"]
    for name in ("mps", "meta", "hpu", "xpu", "vulkan"):
        for main, arguments in ((sample.main, [f"--out_dir={trained}", *knobs]), (train.main, flags(data, tmp_path / "out"))):
            with pytest.raises(UserError, match=f"device={name} cannot be used here: .*--device=cpu"):
                main([*arguments, f"--device={name}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device=cuda:1 would put all 2 processes on one card"):
        fit(data, tmp_path / "out", device="cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train, "pick_device", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="needs card 1, and this machine has 1: take --nproc_per_node=1, or --device=cpu"):
        fit(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="malloc's settings are those of Linux")
def test_a_step_does_not_wait_for_pages():
    """Page faults of blocks as large as activations, made and freed ten times after the heap has grown to hold them."""
    code = """
import resource, sys, torch, device
if sys.argv[1] == "keep":
    device.keep_memory()
def step():
    return [torch.ones(n << 20) for n in (1, 4, 16)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, returned = (int(run("-c", code, way)) for way in ("keep", "return"))
    assert 3 * kept < returned  # the heap may still grow once during the ten


# ---------------------------------------------------------------------------------------------------------------------
# sampling


def test_sample(trained, tmp_path, capsys):
    """Prompts, seeds, temperatures, several texts at once, and the command as a process."""

    def text(*knobs):
        sample.main([f"--out_dir={trained}", "--max_new_tokens=40", *knobs])
        return capsys.readouterr().out

    assert text("--start=17 times ").startswith("17 times ")
    assert text("--temperature=0", "--seed=1") == text("--temperature=0", "--seed=2")
    assert text("--seed=1") == text("--seed=1") != text("--seed=2")
    three = text("--num_samples=3").split("\n---------------\n")  # drawn together, and each on its own
    assert len(three) == len(set(three)) == 3
    assert set(text("--num_samples=2", "--temperature=0").rstrip("\n").split("\n---------------\n")) == {
        text("--temperature=0").rstrip("\n")
    }
    assert text("--start=naïve 東 ", "--top_k=1000").startswith("naïve 東 ")
    (tmp_path / "prompt").write_text("x" * 100)  # longer than block_size
    assert text(f"--start=FILE:{tmp_path / 'prompt'}").startswith("x" * 100)
    assert text("--n_loop=2", "--temperature=0") != text("--temperature=0")
    assert text("--temperature=2", "--top_p=1e-6") == text("--temperature=0")
    assert run("sample.py", f"--out_dir={trained}", "--max_new_tokens=40", "--start=3 times") == text("--start=3 times")


def test_end_of_text_in_a_prompt_is_the_token(trained, capsys, monkeypatch):
    """As in nanoGPT, whose prompts may start with it."""
    seen, stream = [], GPT.stream
    monkeypatch.setattr(GPT, "stream", lambda self, idx, *a, **k: seen.append(idx.tolist()) or stream(self, idx, *a, **k))
    sample.main([f"--out_dir={trained}", "--max_new_tokens=1", "--start=<|endoftext|>1<|endoftext|>"])
    assert seen == [[[256, ord("1"), 256]]] and capsys.readouterr().out.startswith("1")


def test_a_prompt_beyond_the_token_table_is_refused(tmp_path):
    """As when a model has fewer rows than its tokenizer has tokens."""
    save_run(tmp_path, tiny(vocab_size=100))
    for start, token in (("~", 126), ("é", 195)):
        with pytest.raises(UserError, match=f"the prompt has the token {token}, the model knows 100"):
            sample.main([f"--out_dir={tmp_path}", f"--start={start}"])


def test_text_comes_as_it_is_generated(trained):
    """In whole characters, also to a terminal that is not UTF-8; Ctrl-C keeps what there is; a reader may go away."""
    command = [sys.executable, "-u", "sample.py", f"--out_dir={trained}", "--start=né", "--temperature=0"]
    for env, start in ((dict(PYTHONIOENCODING="utf-8"), "né"), (dict(PYTHONIOENCODING="ascii"), "n?")):
        process = subprocess.Popen([*command, "--max_new_tokens=100000"], cwd=ROOT, env=os.environ | env,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        first = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=180)
        assert process.returncode == 0 and not errors and rest.endswith(b"\n")
        assert (first + rest).decode(env["PYTHONIOENCODING"]).startswith(start)
    process = subprocess.Popen([*command, "--max_new_tokens=3000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(180) == 0 and process.stderr.read() == b""


@needs("tiktoken_cache")
def test_released_weights_are_sampled_without_training(gpt2_folder, capsys):
    """The likeliest continuation is the one that transformers finds."""
    folder, theirs = gpt2_folder(vocab_size=50257)
    sample.main([f"--init_from={folder}", "--start=a", "--temperature=0", "--max_new_tokens=9"])
    tokenizer = get_tokenizer("gpt2")
    expected = theirs.generate(torch.tensor([tokenizer.encode("a")]), max_new_tokens=9, do_sample=False, pad_token_id=50256)[0]
    expected = [t for t in expected.tolist() if t != tokenizer.eot_token]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(expected).rstrip("\n")


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one clear error, exit code 1


def test_bad_command_lines(data, trained, tmp_path):
    """Every mistake gets a UserError with the value and the remedy; from the shell it is one line."""
    knobs = [f"--data_dir={data}", "--dataset=squares", f"--out_dir={tmp_path}", "--block_size=32"]
    for module, arguments, words in (
        (train, [*knobs, "--n_embed=8", "--variant=NagMH", "--lr=x", "--n_head=5"], ["n_embd?", "NagMHA?", "lr", "n_head=5"]),
        (train, [*knobs, "--dataset=nothing"], ["prepare.py nothing"]),
        (train, [*knobs, "--init_from=resume"], ["no checkpoint", "python train.py"]),
        (train, [*knobs, "config/none.toml"], ["config/none.toml"]),
        (train, [*knobs, "--vocab_size=100"], ["257"]),
        (train, [*knobs, "--learning_rate=0"], ["learning_rate=0"]),
        (train, [*knobs, "--init_from=./gpt-2"], ["neither scratch"]),
        (train, [*knobs, "--logger=wandb"], ["pip install wandb"]),
        (train, [*knobs, "--device=gpu"], ["device='gpu'", "cuda"]),
        (sample, [f"--out_dir={trained}", "--device=gpu"], ["device='gpu'", "cuda"]),
        (train, [*knobs, f"--out_dir={trained}", "--init_from=resume", "--n_layer=3"], ["n_layer=2, not 3"]),
        (train, [*knobs, "--block_size=100000"], ["100001", "lower block_size"]),
        (train, [*knobs, f"--out_dir={data / 'text.txt'}"], ["out_dir", "--out_dir"]),
        (sample, [f"--out_dir={tmp_path / 'none'}"], ["no checkpoint", "python train.py"]),
        (sample, [f"--out_dir={trained}", "--top_k=0", "--temperature=-1"], ["top_k=0", "temperature=-1"]),
        (sample, [f"--out_dir={trained}", "--start=FILE:nowhere"], ["nowhere"]),
        (sample, [f"--out_dir={trained}", "--n_loop=0"], ["n_loop=0"]),
        *(
            (sample, [f"--out_dir={trained}", f"--temperature={t}"], [f"temperature={t}", "0.001"])
            for t in ("nan", "inf", "1e-45")
        ),
        (sample, [f"--out_dir={trained}", "--top_p=0"], ["top_p=0.0"]),
        (plot, [str(tmp_path / "none")], ["none"]),
    ):
        with pytest.raises(UserError) as error:
            module.main(arguments)
        for word in words:
            assert word in str(error.value)
    message = run("train.py", *knobs, "--n_embed=8", code=1)
    assert message.startswith("error: ") and message.count("\n") == 1


def test_broken_checkpoints_are_refused(trained, tmp_path):
    """Files that are cut, random or malicious; no code in them runs."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    whole = (trained / "ckpt.pt").read_bytes()
    noise = random.Random(0)
    for content in (b"", whole[:1000], whole[:-100], *(noise.randbytes(100) for _ in range(300))):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            checkpoint.load(tmp_path / "ckpt.pt")
    torch.save(Payload(), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# the files a user starts from


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda p: p.stem)
def test_configs(path):
    """Each parses, names its command, and a stated number of parameters is true."""
    text = path.read_text()
    cfg = parse(train.Config, [str(path)])
    assert f"config/{path.name}" in text.splitlines()[0] + text.splitlines()[1]
    vocab = cfg.vocab_size or 257
    with torch.device("meta"):
        model = GPT(GPTConfig(**{f: getattr(cfg, f) for f in GPTConfig.__dataclass_fields__} | dict(vocab_size=vocab)))
    stated = re.search(r"([\d.]+)M parameters", text)
    assert stated, "say the number of parameters"
    assert sum(model.count_parameters().values()) / 1e6 == pytest.approx(float(stated[1]), abs=0.06)


def test_the_demos_baseline_is_of_its_recipe():
    """The stored curve of MHA, which make demo draws beside its own: steps, rates and tokens of config/demo.toml."""
    cfg = parse(train.Config, [str(ROOT / "config" / "demo.toml")])
    records = plot.read_metrics(str(ROOT / "results" / "demo_mha.jsonl"))
    assert records[-1]["step"] == cfg.max_iters and "val_loss" in records[-1]
    for r in (r for r in records if "lr" in r):
        assert r["lr"] == pytest.approx(train.learning_rate(r["step"], cfg))
        assert r["tokens"] == (r["step"] + 1) * cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size


def test_help_names_every_knob():
    """With a default and a meaning, and the values of a choice."""
    text = run("train.py", "--help")
    for name in train.Config.__dataclass_fields__:
        assert re.search(rf"^  {name}=\S* +\S", text, re.MULTILINE), name
    assert re.search(rf"^  energy=None .* \({', '.join(ENERGIES)}\)$", text, re.MULTILINE)
    assert re.search(r"^  optimizer=adamw .* \(adamw, muon\)$", text, re.MULTILINE)


def test_labels_of_a_plot(tmp_path):
    (odd := tmp_path / "MHA_beta=0.5-1").mkdir()
    assert plot.labelled("a run=out/x=y") == ("a run", "out/x=y")
    assert plot.labelled(str(odd)) == ("MHA_beta=0.5-1", str(odd))
    assert plot.labelled("out/mha/metrics.jsonl") == ("mha", "out/mha/metrics.jsonl")


def test_plot(trained, tmp_path):
    """A picture, whatever the horizontal axis."""
    for by in ("step", "tokens", "seconds"):
        run("-m", "experiments.plot", trained, trained, "--by", by, "--out", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
@needs("tinyshakespeare", "tinystories-sample", "glue", "hellaswag", "ai2_arc", "tiktoken_cache")
def test_readme_commands(tmp_path):
    """Every command of the README, docs/ and experiments/README.md runs as written, on tiny models and budgets."""
    shutil.copy(SHARED / "tinyshakespeare" / "input.txt", tmp_path)
    for name in ("config", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    small = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=32 --batch_size=2 --eval_iters=1 --eval_interval=2 --max_iters=2"
    extra = {"train.py": small, "sample.py": "--max_new_tokens=5", "lis": "--documents=2000"}
    extra |= {
        "prepare.py minipile": f"--source={SHARED / 'tinystories-sample'}",
        "resume": "--max_iters=4",
        "compare": f"-- {small}",
    }
    extra |= {"glue": f"--source={SHARED / 'glue'} --limit=64 --epochs=1 --tasks rte", "evaluate": f"--data={SHARED} --limit=2"}
    extra |= {"--max_tokens=14000000": "--overwrite"}  # the same data set at another size
    extra |= {"toy": "--steps=10 --seeds=1", "sharpness": "--batches=1 --probes=2 --iterations=2"}
    extra |= {"bars": "starting --rounds=1 --margin=1e9"}
    extra |= {"bench": "--variants MHA --n_layer=1 --n_embd=12 --block_size=16 --rounds=1"}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "README.md"]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(commands) > 12
    env = os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1",
                            TIKTOKEN_CACHE_DIR=str(SHARED / "tiktoken_cache"))  # fmt: skip
    for command in commands:
        if not command.startswith(("make", "git", "TIKTOKEN_CACHE_DIR")):  # the last two want a network, or a card
            for word, here in {"nnodes=2": "nnodes=1", "nproc_per_node=8": "nproc_per_node=1", "HOST": "localhost"}.items():
                command = command.replace(word, here)
            command += "".join(f" {more}" for word, more in extra.items() if word in command)
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
