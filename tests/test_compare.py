"""experiments.compare: its statistics against other sources, which runs it takes for finished, and tiny comparisons."""

import argparse
import json
import math
import shutil
import statistics
import subprocess
from dataclasses import asdict

import pytest
import torch

import checkpoint
import train
from configurator import parse
from conftest import TINY, save_run, save_tokens, tiny
from data import fingerprint, read_meta
from experiments import compare
from guard import UserError
from model import GPT, GPTConfig

RUN = TINY | dict(max_iters=12, eval_interval=6, min_lr=1e-3, dataset="squares")


@pytest.fixture
def flags(data, tmp_path, monkeypatch):
    """What follows --, for tiny runs; the working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.toml").write_text("")
    return [f"--{k}={v}" for k, v in (RUN | dict(data_dir=data)).items()]


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, one after the other: no time is lost on starting others. A list of the folders that ran."""
    ran = []

    def run_all(commands, jobs):
        for folder, command in commands.items():
            train.main(command)
            ran.append(folder)

    monkeypatch.setattr(compare, "run_all", run_all)
    return ran


def result(name):
    with open(f"results/{name}.json") as file:
        data = json.load(file)
    with open(f"results/{name}.md") as file:
        return data, file.read()


def final(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return json.loads(file.readlines()[-1])["val_loss"]


def test_paired():
    """Student's own example, the sleep data of 1908, whose p and interval R's documentation of t.test gives."""
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    mean, interval, p = compare.paired(a, b)
    assert mean == pytest.approx(-1.58) and interval == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert p == pytest.approx(0.002833, abs=5e-7)
    # n = 2: t = mean / half the range is Cauchy's, whose tails are arctangents
    assert compare.paired([3.0, 5.0], [2.0, 2.0])[2] == pytest.approx(1 - 2 / math.pi * math.atan(2 / 1))
    assert compare.paired([1.0], [2.0]) == (-1, None, None)
    assert compare.paired([1.0, math.inf], [2.0, 2.0]) == (None, None, None)
    assert compare.paired([1.0, 2.0], [1.0, 2.0]) == (0, None, None)


def test_holm():
    """What R's p.adjust(c(0.04, 0.01, 0.05, 0.02, 0.03), "holm") gives; what has no p is no test."""
    ps = dict(a=0.04, b=0.01, none=None, c=0.05, d=0.02, e=0.03)
    assert compare.holm(ps) == pytest.approx(dict(a=0.09, b=0.05, none=None, c=0.09, d=0.08, e=0.09))
    assert compare.holm(dict(a=0.7, b=0.9)) == dict(a=1, b=1)


@pytest.mark.parametrize("variant, calls", [("MHA", 6), ("YuriiFormerEuler", 6), ("VerletFormer", 9), ("IMEXFormer", 12),
                                            ("CEM+", 12), ("LoopNagMHA", 24)])  # fmt: skip
def test_oracle_calls(variant, calls):
    """Of three layers: 1.5 times as many with Strang splitting, twice with two iterations or two inner steps."""
    assert compare.oracle_calls(GPTConfig(variant=variant, n_layer=3, n_head=2, n_embd=8, vocab_size=9)) == calls


def test_reach():
    points = [(0, 5.0, 0.1), (10, 3.0, 0.1), (20, 3.5, 0.1), (30, 1.0, 0.1)]
    for target, x in ((6, 0), (5, 0), (4, 5), (3, 10), (2, 26), (1, 30)):
        assert compare.reach(points, target) == pytest.approx(x)
    assert compare.reach(points, 0.9) is None


def test_curve():
    runs = [dict(validation=[(0, a), (5, b)]) for a, b in ((4, 1), (6, 1))]
    system = dict(per_step=dict(steps=1, tokens=8, seconds=2), runs=runs)
    assert compare.curve(system, "validation", "steps") == [(0, 5, pytest.approx(2**0.5)), (5, 1, 0)]
    assert compare.curve(system, "validation", "tokens")[1][0] == 40
    assert compare.curve(system, "validation", "seconds")[1][0] == 10
    assert compare.curve(system | dict(runs=runs[1:]), "validation", "steps") == [(0, 6, 0), (5, 1, 0)]
    # minus a base that was evaluated at other steps: its two seeds lie on lines from 3 to 1 and from 5 to 1
    base = dict(per_step=dict(steps=1, tokens=4), runs=[dict(validation=[(0, a), (10, 1)]) for a in (3, 5)])
    assert compare.curve(system, "validation", "steps", base) == [(0, 1, 0), (5, -1.5, pytest.approx(0.5**0.5))]
    assert compare.curve(system, "validation", "tokens", base) == [(0, 1, 0), (40, 0, 0)]


def test_spike():
    records = [dict(train_loss=loss) for loss in (12.0, *[2.0] * 9)] + [dict(val_loss=9.0)]  # the ten have mean 3
    assert compare.spike([*records, dict(train_loss=6.0), dict(train_loss=1.0)]) == 2
    assert math.isnan(compare.spike(records))


@pytest.mark.parametrize("backbone, even", [("gpt2", 1), ("llama", 2)])
@pytest.mark.parametrize("other", ["YuriiFormer --n_layer=3", "CEM+", "MHA --n_embd=48", "LinearMHA --n_layer=1 --n_embd=6"])
def test_match_is_the_nearest_of_all_widths(other, backbone, even, flags):
    """Against models that are built, for every width; with heads of 8, 16, ... if one of those comes within 1%."""
    common = ["empty.toml", *flags, "--n_head=3", "--n_embd=24", "--vocab_size=101"]

    def size(command):
        cfg = parse(train.Config, command)
        config = GPTConfig(**{k: getattr(cfg, k) for k in asdict(GPTConfig())})
        return sum(p.numel() for p in GPT(config).parameters())

    command = compare.command_of(f"MHA --backbone={backbone} --match='{other}'", common)
    wanted = size(compare.command_of(other, common))
    off = {width: abs(size([*command, f"--n_embd={width}"]) / wanted - 1) for width in range(3 * even, 160, 3 * even)}
    fast = min(range(24, 160, 24), key=off.get)
    assert command[-1] == f"--n_embd={fast if off[fast] < 0.01 else min(off, key=off.get)}"


def test_which_runs_are_finished(flags, tmp_path):
    cfg = parse(train.Config, [*flags, "--variant=NagMHA", "--seed=3", "--out_dir=here"])

    squares = fingerprint(read_meta(f"{cfg.data_dir}/{cfg.dataset}"))

    def progress(stored, asked=cfg, step=7, text=squares):
        rest = dict(model={}, model_config={}, tokenizer="bytes", data=text)
        checkpoint.save(tmp_path, rest | dict(config=stored, step=step), best=False)
        return compare.progress(tmp_path, asked)

    stored = asdict(cfg)
    assert compare.progress(tmp_path / "nowhere", cfg) is None
    assert progress(stored) == 7 and progress(stored, step=12) == 12
    for other in (dict(seed=4), dict(out_dir="there"), dict(max_iters=24), dict(beta=0.8), dict(init_from="x.pt")):
        assert progress(stored | other) is None
    assert progress(stored, text="other") is None  # the data set was prepared again, from another text
    # an older train.py, which had no such knobs: it did what their defaults do
    old = {k: v for k, v in stored.items() if k not in ("grad_clip", "delta", "beta")}
    assert progress(old) == 7
    for new in ("--grad_clip=0.5", "--energy=huber", "--beta=0.8"):
        asked = parse(train.Config, [*flags, "--variant=NagMHA", "--seed=3", "--out_dir=here", new])
        assert progress({k: v for k, v in old.items() if k != "energy"}, asked) is None
    # one that was stopped and resumed
    assert progress(stored | dict(init_from="resume"), step=12) == 12


@pytest.mark.slow
def test_budget_of_tokens_sweep_and_match(flags, here):
    """2,100 tokens allow 8 steps of 256 or 16 of 128. Every rate is tried for half of them, on a seed that no run has."""
    systems = ["MHA", "NagMHA --batch_size=2 --eval_iters=4 --match=YuriiFormer"]
    compare.main(["t", "--config=empty.toml", "--seeds", "5", "6", "--systems", *systems, "--tokens", "2100",
                  "--tuning_share=0.5", "--learning_rates", "0.0001", "0.04", "--", *flags])  # fmt: skip
    data, table = result("t")
    folders = ["out/t/" + system.replace(" --", "_") for system in systems]
    kinds = ("rate=0.0001-tuning", "rate=0.04-tuning", "5", "6", "timed")
    assert sorted(here) == sorted(f"{folder}-{kind}" for folder in folders for kind in kinds)
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 3}
    for i, (system, folder, steps) in enumerate(zip(systems, folders, (8, 16), strict=True)):
        tried = {rate: final(f"{folder}-rate={rate}-tuning") for rate in ("0.0001", "0.04")}
        best = min(tried, key=tried.get)
        for rate, loss in tried.items():
            assert rows[rate][2 + i].strip() == f"{loss:.4f}"
            state = checkpoint.load(f"{folder}-rate={rate}-tuning/ckpt.pt")
            assert (state["step"], state["config"]["seed"]) == (steps // 2, 0)
        for seed in (5, 6):
            state = checkpoint.load(f"{folder}-{seed}/ckpt.pt")
            assert (state["step"], state["config"]["seed"]) == (steps, seed)
            assert state["config"]["learning_rate"] == float(best)
            assert state["config"]["min_lr"] == pytest.approx(float(best) / 10)  # 1e-3 of 1e-2
        words = ", width 20" if "match" in system else ""  # YuriiFormer has two tables more, of 257 and 32 rows
        mean = statistics.mean(final(f"{folder}-{seed}") for seed in (5, 6))
        assert rows[f"{system}{words}, rate {best}"][2].strip().startswith(f"{mean:.4f} ± ")
    assert "by a run of seed 0 and 0.5 of the budget:" in table
    assert "seed 0 and the whole budget:" in compare.report(data | dict(tuning_share=1.0))
    assert state["model_config"]["n_embd"] == 20 and data["budget"] == ["tokens", 2100] and data["config"]["max_iters"] == 8


def test_rates_grow_until_the_best_is_inside(flags, monkeypatch):
    """Losses are known functions of the rate: one falls up to 0.03, one grows from 0.005 on, one is least in the middle."""
    least, ran = {"MHA": 0.03, "NagMHA": 0.004, "MomenMHA": 0.01}, []

    def outcomes(commands, known, jobs):
        configs = {folder: parse(train.Config, command) for folder, command in commands.items()}
        ran.append(sorted((cfg.variant, cfg.learning_rate) for cfg in configs.values()))
        return {f: dict(validation=[(1, abs(math.log(cfg.learning_rate / least[cfg.variant])))]) for f, cfg in configs.items()}

    def rates(*more):
        ran.clear()
        args = argparse.Namespace(learning_rates=[0.02, 0.005, 0.01], tuning_seed=0, tuning_share=1, jobs=1, grow=bool(more))
        commands = {name: [*flags, f"--variant={name}"] for name in least}
        tried = compare.tune(commands, lambda *words: "-".join(words), [], args)
        return {system: sorted(of_rate) for system, of_rate in tried.items()}

    monkeypatch.setattr(compare, "outcomes", outcomes)
    assert rates() == dict.fromkeys(least, [0.005, 0.01, 0.02])
    found = {"MHA": [0.005, 0.01, 0.02, 0.04, 0.08], "NagMHA": [0.0025, 0.005, 0.01, 0.02], "MomenMHA": [0.005, 0.01, 0.02]}
    assert rates("grow") == found and len(ran) == 3  # 0.08 is no better than 0.04, and 0.0025 no better than 0.005


@pytest.mark.slow
def test_budget_of_oracle_calls(flags, here):
    """Whoever asks 1.5 times or twice as often gets as many steps fewer: 48 calls are 12 steps of two layers of MHA."""
    steps = {"MHA": 12, "VerletFormer": 8, "IMEXFormer": 6}
    compare.main(["c", "--config=empty.toml", "--seeds=1", "--untimed", "--systems", *steps, "--calls=48", "--", *flags])
    data, table = result("c")
    assert {name: checkpoint.load(f"out/c/{name}-1/ckpt.pt")["step"] for name in steps} == steps
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 9}
    assert "after 48 oracle calls of training" in table and "| oracle calls to MHA's loss |" in table
    for name, n in steps.items():
        assert rows[name][5].strip() == f"{256 * n:,}" and rows[name][6].strip() == "48" and rows[name][7].strip() == ""
        assert data["systems"][name]["runs"][0]["validation"][-1][0] == n


@pytest.mark.slow
def test_reuse(flags, here):
    """What an earlier comparison has, with its rates, is not trained again; a run that differs in anything is."""

    def main(name, *words, more=()):
        here.clear()
        compare.main([name, "--config=empty.toml", "--untimed", "--seeds=1", "--learning_rates", "0.01", "0.02", *words,
                      "--", *flags, *more])  # fmt: skip
        return result(name)[0]["systems"]

    first = main("a", "--systems", "MHA", "NagMHA")
    assert len(here) == 6 and all(checkpoint.load(f"{folder}/ckpt.pt")["step"] == 12 for folder in here)  # rates, too
    with open("none.json", "w") as file:
        json.dump(dict(systems={}), file)
    again = main("b", "--systems", "NagMHA", "MHA", "MomenMHA", "--reuse", "none.json", "--reuse", "results/a.json")
    assert sorted(here) == [f"out/b/MomenMHA-{kind}" for kind in ("1", "rate=0.01-tuning", "rate=0.02-tuning")]
    for name in first:
        assert again[name]["runs"] == first[name]["runs"] and again[name]["tuning"] == first[name]["tuning"]
    assert [*again] == ["NagMHA", "MHA", "MomenMHA"]
    main("c", "--systems", "NagMHA", "MHA", "--reuse", "results/a.json", more=["--weight_decay=0.2"])
    assert len(here) == 6
    # the same data elsewhere, then other data under the same name
    folder = next(flag for flag in flags if flag.startswith("--data_dir=")).partition("=")[2]
    shutil.copytree(folder, "moved")
    main("d", "--systems", "MHA", "--reuse", "results/a.json", more=["--data_dir=moved"])
    assert not here
    with open("moved/squares/meta.json") as file:
        meta = json.load(file)
    meta["shards"]["train"], meta["shards"]["val"] = meta["shards"]["val"], meta["shards"]["train"]
    with open("moved/squares/meta.json", "w") as file:
        json.dump(meta, file)
    main("e", "--systems", "MHA", "--reuse", "results/a.json", more=["--data_dir=moved"])
    assert len(here) == 3
    # a knob that is newer than the table: it had the value that is now the default
    with open("results/a.json") as file:
        table = json.load(file)
    for s in table["systems"].values():
        for run in (*s["runs"], *s["tuning"].values()):
            del run["config"]["n_loop"]
    with open("old.json", "w") as file:
        json.dump(table, file)
    main("f", "--systems", "MHA", "--reuse", "old.json")
    assert not here


OLD = '{"systems": {"MHA": {"runs": [{"command": "python train.py"}], "tuning": {"0.1": 2.3}}}}'


@pytest.mark.parametrize("text", [None, "[]", '{"systems": 3}', '{"systems": {"MHA": 3}}', "{", OLD, OLD.replace("2.3", "{}")])
def test_reuse_of_something_else(text, flags, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="--reuse x.json is not the .json of a comparison"):
        compare.main(["x", "--config=empty.toml", "--systems", "MHA", "--reuse", "x.json", "--", *flags])


@pytest.mark.slow
def test_budget_of_seconds(flags, here):
    """The number of steps follows from the speed of a short run, and the schedule ends where the budget does."""
    compare.main(["s", "--config=empty.toml", "--seeds", "1", "--systems", "MHA", "MHA --n_layer=8", "--seconds", "0.5",
                  "--", *flags, "--lr_decay_iters=7"])  # fmt: skip
    assert here == ["out/s/MHA-timed", "out/s/MHA_n_layer=8-timed", "out/s/MHA-1", "out/s/MHA_n_layer=8-1"]
    data, table = result("s")
    for folder in here[:2]:
        with open(f"{folder}/metrics.jsonl") as file:
            speeds = [r["tokens_per_second"] for r in map(json.loads, file) if "tokens_per_second" in r]
        state = checkpoint.load(folder.replace("timed", "1") + "/ckpt.pt")
        assert state["step"] == max(1, round(0.5 * statistics.median(speeds) / 256)) and len(speeds) > 3
        assert state["config"]["lr_decay_iters"] is None
    assert data["budget"] == ["seconds", 0.5]
    assert "seconds to MHA's loss" in table


def test_what_is_refused(flags, tmp_path):
    def refused(*words):
        with pytest.raises(UserError) as error:
            compare.main(["x", "--config=empty.toml", *words, "--", *flags])
        return str(error.value)

    assert "--tokens -1 must be positive" in refused("--systems", "MHA", "--tokens", "-1")
    assert "--calls nan must be positive and finite" in refused("--systems", "MHA", "--calls", "nan")
    assert "did you mean NagMHA" in refused("--systems", "MHA", "NagMH")
    assert "did you mean NagMHA" in refused("--systems", "MHA --match=NagMH")
    assert "learning_rate=-1.0 must be positive" in refused("--systems", "MHA", "--learning_rates", "-1")
    assert "--grow needs two --learning_rates" in refused("--systems", "MHA", "--learning_rates", "0.1", "0.1", "--grow")
    assert "--tuning_share 25 must lie above 0" in refused("--systems", "MHA", "--tuning_share", "25")
    assert "--seeds 3 3: a seed that comes twice" in refused("--systems", "MHA", "--seeds", "3", "3")
    assert "--tuning_seed 2 is one of --seeds" in refused("--systems", "MHA", "--learning_rates", "1", "--tuning_seed", "2")
    assert "no finished data set" in refused("--systems", "MHA", "MHA --dataset=other")
    (tmp_path / "other").mkdir()
    save_tokens(tmp_path / "other", train=500, val=500)
    for other in ("--eval_iters=9", "--block_size=8", f"--dataset=other --data_dir={tmp_path}"):
        assert "evaluate on different windows" in refused("--systems", "MHA", f"MHA {other}")
    assert "different budgets: let max_iters be the same" in refused("--systems", "MHA", "MHA --max_iters=6")


def test_weights_bring_their_own_sizes(flags, here, tmp_path):
    """The table states the sizes and the oracle calls of the models that ran, not those of the configuration."""
    save_run(tmp_path, tiny("MHA", n_layer=3, block_size=32))
    compare.main(["w", "--config=empty.toml", "--untimed", "--seeds", "1", "--systems", "MHA",
                  "--", *[flag for flag in flags if "n_" not in flag], "--init_from=ckpt.pt"])  # fmt: skip
    data, table = result("w")
    assert "\n3 layers, width 16," in table and data["systems"]["MHA"]["per_step"]["calls"] == 6


def test_a_line_that_a_full_disk_cut_short(tmp_path):
    """A run that has one goes on: it did not diverge, and its curve ends before it."""
    assert not compare.diverged(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert not compare.diverged(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 4, "stopp')
    assert not compare.diverged(tmp_path) and compare.read_metrics(tmp_path) == [{"step": 0}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 4, "stopped": "nan"}\n')
    assert compare.diverged(tmp_path)


@pytest.mark.slow
def test_compare(flags, monkeypatch):
    """Two systems and two seeds, one of the four runs interrupted before; a second call runs nothing again."""
    command = ["small", "--config=empty.toml", "--jobs=2", "--systems", "MHA", "NagMHA --beta=0.5", "--", *flags]
    seed_2 = [*flags, "--variant=MHA", "--seed=2"]
    train.main([*seed_2, "--out_dir=whole"])
    save = checkpoint.save

    def save_and_stop(folder, state, *rest):
        save(folder, state, *rest)
        if state["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "save", save_and_stop)
        train.main([*seed_2, "--out_dir=out/small/MHA-2"])

    compare.main(command)
    data, table = result("small")
    losses = [final(f"out/small/{run}") for run in ("MHA-1", "MHA-2", "NagMHA_beta=0.5-1", "NagMHA_beta=0.5-2")]
    for pair in losses[:2], losses[2:]:
        assert f"| {sum(pair) / 2:.4f} ± {abs(pair[0] - pair[1]) / 2**0.5:.4f} |" in table
    # of two differences: the mean, and half their distance times 12.706, the 97.5% quantile of Cauchy's distribution
    low, high = sorted((losses[2] - losses[0], losses[3] - losses[1]))
    mean, half = (low + high) / 2, math.tan(0.475 * math.pi) * (high - low) / 2
    assert f"| {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}] |" in table
    assert [run["validation"][-1] for run in data["systems"]["NagMHA --beta=0.5"]["runs"]] == [[12, x] for x in losses[2:]]
    # the stopped run went on from there, to the end of a run that never stopped
    with open("out/small/MHA-2.log") as file:
        assert "step      0" not in (log := file.read()) and "step     12: validation" in log
    whole, resumed = (checkpoint.load(f"{folder}/ckpt.pt")["model"] for folder in ("whole", "out/small/MHA-2"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    # where it was made
    assert f"torch {torch.__version__}" in table and data["systems"]["MHA"]["runs"][0]["hardware"]
    with open("results/small.png", "rb") as file:
        png = file.read()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000

    def nothing(*args, **kwargs):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(compare.subprocess, "run", nothing)
    compare.main(command)
    assert result("small") == (data, table)


@pytest.mark.slow
def test_a_run_that_fails_says_where_to_look(flags):
    with pytest.raises(UserError, match=r"see out/x/MHA-timed.log: python train.py empty.toml"):
        compare.main(["x", "--config=empty.toml", "--systems", "MHA", "--seeds", "1", "--", *flags, "--init_from=none.pt"])


def test_a_run_that_was_stopped_is_not_finished(flags, monkeypatch):
    """Though train.py's exit code is then 0."""
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    with pytest.raises(UserError, match="failed or was stopped"):
        compare.main(["x", "--config=empty.toml", "--systems", "MHA", "--seeds", "1", "--", *flags])


@pytest.mark.slow
def test_a_rate_at_which_runs_diverge(flags, monkeypatch):
    """It is the worst, is shown as such and isn't run again."""
    command = ["d", "--config=empty.toml", "--seeds", "1", "--systems", "MHA", "--learning_rates", "1e30", "0.01", "--", *flags]
    compare.main(command)
    systems = ["MHA", "NagMHA --learning_rate=1e30"]
    compare.main(["e", "--untimed", "--config=empty.toml", "--seeds", "1", "2", "--systems", *systems, "--", *flags])
    assert "| NagMHA --learning_rate=1e30 | diverged |  |  |" in result("e")[1]
    with pytest.raises(UserError, match="NagMHA .*1e30, with which the others are compared, diverged"):
        compare.main(["e", "--untimed", "--config=empty.toml", "--seeds", "1", "2", "--systems", *systems[::-1], "--", *flags])
    data, table = result("d")
    assert data["systems"]["MHA"]["rate"] == 0.01 and "| 1e+30 | diverged |" in table
    monkeypatch.setattr(compare.subprocess, "run", None)
    compare.main(command)


def test_systems_are_judged_on_the_same_windows(flags):
    with pytest.raises(UserError, match="different windows"):
        compare.main(["x", "--config=empty.toml", "--systems", "MHA", "MHA --batch_size=2", "--", *flags])
