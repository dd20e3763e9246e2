"""experiments.glue on tasks made up in the hub's layout, with tiny models."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import conftest
import train
from conftest import SHARED, needs, save_run, tiny
from data import get_tokenizer
from experiments import glue
from guard import UserError
from model import VARIANTS

BYTES = get_tokenizer("bytes")
SETTINGS = dict(epochs=1, batch_size=8, learning_rate=1e-2, weight_decay=0.1, limit=None)


@pytest.fixture
def run(tmp_path):
    """The folder of a checkpoint, of an untrained MHA."""
    save_run(tmp_path, tiny())
    return str(tmp_path)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """
    GLUE in the hub's layout, in small: cola, whether a sentence names a cat; rte, whether the hypothesis repeats the
    premise's letter, labels 1, 0, 0, 0, ...; stsb, how many of five letters are a; mnli, for the names of its columns
    and splits.
    """
    from datasets import Dataset

    folder, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    for split, n in (("train", 256), ("validation", 64)):
        cats, letters, counts = rng.integers(2, size=n), rng.integers(26, size=n), rng.integers(6, size=n)
        tasks = dict(
            cola=dict(
                sentence=[f"the {'cat' if cat else 'dog'} {'x' * (i % 8)}" for cat, i in zip(cats, letters, strict=True)],
                label=cats.tolist(),
            ),
            rte=dict(
                sentence1=[chr(97 + i) for i in letters],
                sentence2=[chr(97 + (i + bool(k % 4)) % 26) for k, i in enumerate(letters)],
                label=[int(k % 4 == 0) for k in range(n)],
            ),
            stsb=dict(
                sentence1=["a" * c + "b" * (5 - c) for c in counts],
                sentence2=["aaaaa"] * n,
                label=counts.astype(np.float32),
            ),
            mnli=dict(premise=["p"] * n, hypothesis=["h"] * n, label=(np.arange(n) % 3).tolist()),
        )
        for task, columns in tasks.items():
            os.makedirs(folder / task, exist_ok=True)
            Dataset.from_dict(columns | dict(idx=list(range(n)))).to_parquet(folder / task / f"{split}-0.parquet")
    configs = ""
    for task in tasks:
        validation = "validation_matched" if task == "mnli" else "validation"
        configs += f"- config_name: {task}\n  data_files:\n  - split: train\n    path: {task}/train-*\n"
        configs += f"  - split: {validation}\n    path: {task}/validation-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def fit(run, source, *arguments, tasks="cola"):
    """The command: its records, and the lines of the table without their frame."""
    out = Path(run) / "made" / "glue.json"
    glue.main([run, "--source", source, "--tasks", *tasks.split(), "--device", "cpu", "--out", str(out), *arguments])
    table = [line for line in out.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    return json.loads(out.read_text()), [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


QUICK = ("--limit", "16", "--epochs", "1", "--batch_size", "8")


def test_separable_tasks_are_learned(run, source):
    flags = ("--learning_rate", "1e-2", "--batch_size", "16", "--seeds", "1", "--dropout", "0")
    (cola, stsb), (head, _, majority, row) = fit(run, source, *flags, tasks="cola stsb")
    for record in (cola, stsb):
        assert (record["training"], record["validation"], record["steps"]) == (256, 64, 48)
    matthews, (pearson, spearman) = cola["scores"]["Matthews"], stsb["scores"].values()
    assert min(matthews, pearson, spearman) > 80
    assert head == ["checkpoint", "cola: Matthews", "stsb: Pearson / Spearman", "average"]
    assert majority == ["majority class", "0.0", "0.0 / 0.0", "0.0"]
    assert row[:3] == [f"`{run}`, MHA, 7 steps", f"{matthews:.1f}", f"{pearson:.1f} / {spearman:.1f}"]


def test_the_table_by_hand():
    """Of two seeds, the sd is the difference over the root of 2; the average is over tasks, not over metrics."""
    mrpc, rte = [dict(F1=80, accuracy=70), dict(F1=84, accuracy=76)], [dict(accuracy=50), dict(accuracy=61)]
    last = glue.table(dict(x=dict(rte=rte, mrpc=mrpc)), ["mrpc", "rte"]).splitlines()[-1]
    assert last == "| x | 82.0 ± 2.8 / 73.0 ± 4.2 | 55.5 ± 7.8 | 66.5 ± 5.7 |"


def test_what_is_finished_is_not_run_again(run, source, monkeypatch):
    first, _ = fit(run, source, *QUICK, "--seeds", "1")
    finetune, runs = glue.finetune, []
    monkeypatch.setattr(glue, "finetune", lambda *args: runs.append(args) or finetune(*args))
    both, table = fit(run, source, *QUICK, "--seeds", "1", "2")
    assert len(runs) == 1 and both[:1] == first and [r["seed"] for r in both] == [1, 2]
    assert fit(run, source, *QUICK, "--seeds", "1", "2") == (both, table) and len(runs) == 1
    # other settings, or other weights under the old name, are another run
    assert len(fit(run, source, *QUICK, "--seeds", "1", "--weight_decay", "0")[0]) == 3
    state = checkpoint.load(Path(run) / "best.pt")
    checkpoint.save(Path(run), state | dict(step=8), best=True)
    records, table = fit(run, source, *QUICK, "--seeds", "1")
    assert len(records) == 4 and table[-1][0].endswith("8 steps")
    # and each says where it comes from
    for record in records:
        assert record["torch"] == torch.__version__ and record["hardware"]
        assert record["checkpoint"] == run and record["settings"]["limit"] == 16


def test_a_seed_fixes_the_run(source, monkeypatch):
    rows, labels, _ = glue.encode(glue.load(source, "cola")[0], BYTES, 32)
    outputs, seen = glue.outputs, []
    monkeypatch.setattr(glue, "outputs", lambda model, rows: seen.extend(rows) or outputs(model, rows))

    def trained(seed, **settings):
        """Steps, parameters afterwards, and the examples seen, by their place."""
        model = tiny(dropout=0.1)
        del seen[:]
        torch.seed()  # whatever was drawn before does not matter
        steps = glue.finetune(model, rows, labels, SETTINGS | dict(limit=20) | settings, seed)
        assert model.training  # with dropout
        places = {id(row): place for place, row in enumerate(rows)}
        return steps, dict(model.named_parameters()), [places[id(row)] for row in seen]

    (steps, a, places), (_, b, same), (_, c, other) = trained(1), trained(1), trained(2)
    assert steps == 3 and places == same and all(torch.equal(a[name], b[name]) for name in a)
    assert len(set(places)) == len(set(other)) == 20 and set(places) != set(other)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    # all weights are trained
    assert not any(torch.equal(a[name], p) for name, p in tiny().named_parameters() if "lm_head" not in name)
    steps, _, places = trained(1, epochs=2)
    assert steps == 6 and set(places[:20]) == set(places[20:]) and places[:20] != places[20:]


@pytest.mark.parametrize("rate", [1e-2, 2e-5])
def test_the_rate_rises_over_a_tenth_and_falls_to_nothing(source, monkeypatch, rate):
    rows, labels, _ = glue.encode(glue.load(source, "cola")[0], BYTES, 32)
    optimizers, rates = train.optimizers, []

    def watched(*args):
        made = optimizers(*args)
        made[0].register_step_pre_hook(lambda opt, *_: rates.append([group["lr"] for group in opt.param_groups]))
        return made

    monkeypatch.setattr(train, "optimizers", watched)
    glue.finetune(tiny("YuriiFormer"), rows, labels, SETTINGS | dict(limit=160, learning_rate=rate), 1)  # 20 steps
    for matrices, norms, scalars in rates:
        assert norms == matrices and scalars == pytest.approx(5 * matrices)
    expected = [0.5, 1, 1, *(i / 18 for i in range(17, 0, -1))]
    assert [groups[0] for groups in rates] == pytest.approx([rate * share for share in expected])


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_padding_nor_company_changes_the_outputs(variant, monkeypatch):
    monkeypatch.setattr(glue, "short_dtype", lambda kind: "float32")
    model = tiny(variant, block_size=40)
    rows = [torch.randint(256, (n,)) for n in (3, 40, 1, 17)]
    expected = torch.cat([model(row[None])[0][:, 0] for row in rows])  # the model's own last logits
    torch.testing.assert_close(glue.outputs(model, rows), expected, rtol=1e-4, atol=1e-5)


def test_predictions_come_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(glue, "short_dtype", lambda kind: "float32")
    model, rows = tiny(dropout=0.5), [torch.randint(256, (n,)) for n in (9, 2, 30, 4, 25)]
    expected = [model(row[None])[0].argmax().item() for row in rows]
    assert len(set(expected)) > 2 and glue.predict(model.train(), rows, 2).tolist() == expected  # without dropout


def test_an_epoch_visits_each_example_once_with_its_likes():
    lengths = np.random.default_rng(0).integers(5, 200, size=1003)
    first, second = (glue.batches(lengths, 8, np.random.default_rng(seed)) for seed in (1, 2))
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(1003)) and sorted(map(len, epoch)) == [3] + 125 * [8]
        padded = sum(lengths[batch].max() * len(batch) for batch in epoch)
        assert padded < 1.1 * lengths.sum()  # unsorted, 1.7 times
        assert np.mean(np.diff([lengths[batch].mean() for batch in epoch]) > 0) < 0.7  # not from short to long
    assert [b.tolist() for b in first] != [b.tolist() for b in second]


def test_tokens_are_joined_and_cut():
    end, (ids, cut) = BYTES.eot_token, glue.tokens(BYTES, ("good", "day"), 9)
    assert ids == [*b"good\nday", end] and cut == 0
    assert glue.tokens(BYTES, ("good",), 5) == ([*b"good", end], 0)
    assert glue.tokens(BYTES, ("goodbye",), 5) == ([*b"good", end], 3)
    # the longer text is cut until both are of one length, and only then the other
    assert glue.tokens(BYTES, ("a long premise", "short"), 14) == ([*b"a long \nshort", end], 7)
    assert glue.tokens(BYTES, ("short", "a long hypothesis"), 8) == ([*b"sho\na l", end], 16)


def test_the_hub_columns_are_read(source):
    training, validation = glue.load(source, "rte")
    rows, labels, cut = glue.encode(validation, BYTES, 4)
    first, second = validation[0]["sentence1"], validation[1]["sentence2"]
    assert bytes(rows[0][:3].tolist()).decode() == f"{first}\n{first}" and bytes(rows[1][2:3].tolist()).decode() == second
    assert {len(row) for row in rows} == {4} and cut == 0
    assert labels.dtype == torch.int64 and labels[:5].tolist() == [1, 0, 0, 0, 1]
    rows, labels, cut = glue.encode(glue.load(source, "stsb")[1], BYTES, 10)
    assert labels.dtype == torch.float32 and cut == 1
    rows, labels, _ = glue.encode(glue.load(source, "mnli")[1], BYTES, 10)
    assert rows[0].tolist() == [*b"p\nh", BYTES.eot_token] and labels[:4].tolist() == [0, 1, 2, 0]
    # three of four are not entailed, in both splits
    assert glue.chance("rte", training, validation) == dict(accuracy=75.0)


def test_the_metrics_are_those_worked_by_hand():
    # 3 hits and 1 miss of four positives, 1 false alarm and 3 rejections of four negatives
    labels, predictions = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 1, 0, 1, 0, 0, 0])
    assert glue.score("mrpc", labels, predictions) == pytest.approx(dict(F1=75, accuracy=75))
    assert glue.score("cola", labels, predictions) == pytest.approx(dict(Matthews=100 * (3 * 3 - 1) / 16))
    # 2 hits, 2 misses, 1 false alarm: precision 2/3, recall 1/2
    predictions = np.array([1, 1, 0, 0, 1, 0, 0, 0])
    assert glue.score("qqp", labels, predictions) == pytest.approx(dict(F1=100 * 4 / 7, accuracy=62.5))
    assert glue.score("mrpc", labels, np.zeros(8)) == dict(F1=0, accuracy=50)
    assert glue.score("mrpc", labels, np.ones(8)) == pytest.approx(dict(F1=200 / 3, accuracy=50))
    # monotone but not linear: deviations (-1.5, -.5, .5, 1.5) and (-3.5, -2.5, -.5, 6.5), product 16, squares 5 and 61
    scores = glue.score("stsb", np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 11]))
    assert scores == pytest.approx(dict(Pearson=100 * 16 / (5 * 61) ** 0.5, Spearman=100))
    assert glue.score("stsb", np.array([1.0, 2, 3]), np.ones(3)) == dict(Pearson=0, Spearman=0)
    assert glue.score("cola", labels, np.ones(8)) == dict(Matthews=0)


def test_what_does_not_fit_is_said(run, source):
    for arguments, message in (
        (["--tasks", "cola", "snli"], "--tasks snli: GLUE has cola"),
        (["--epochs", "0"], "--epochs 0 must be positive"),
        (["--tasks", "qnli"], "cannot load qnli from .* --source DIR"),
        (["--source", f"{source}/missing"], "cannot load cola from .* --source DIR"),
        (["--dropout", "1"], "dropout=1.0"),
        (["--ckpt", "none.pt"], "no checkpoint"),
        (["--out", f"{run}/best.pt"], "not a JSON of this command"),
    ):
        with pytest.raises(UserError, match=message) as error:
            fit(run, source, *arguments)
        assert len(str(error.value).splitlines()) == 1
    assert not (Path(run) / "made").exists()


@pytest.mark.slow
def test_as_a_command(run, source, tmp_path):
    """A second process, a wrong task, then a right one: one line on standard error and code 1, and a table."""
    for task, code in (("snli", 1), ("rte", 0)):
        command = ["-m", "experiments.glue", run, "--source", source, "--tasks", task, "--out", tmp_path / "x.json", *QUICK]
        said = conftest.run(*command, code=code)
    assert "| majority class | 75.0 | 75.0 |" in said and len(json.loads((tmp_path / "x.json").read_text())) == 3


@pytest.mark.slow
@needs("glue")
def test_the_real_tasks(run):
    """Two steps on each of the six tasks that are at hand, and the majority classes that are known of them."""
    records, (_, _, majority, row) = fit(
        run, str(SHARED / "glue"), *QUICK, "--seeds", "1", tasks="cola sst2 mrpc stsb rte wnli"
    )
    # sizes of the splits and shares of the commonest class, from the GLUE paper (arXiv 1804.07461) and the data's card
    assert {r["task"]: (r["training"], r["validation"]) for r in records} == dict(
        cola=(8551, 1043), sst2=(67349, 872), mrpc=(3668, 408), stsb=(5749, 1500), rte=(2490, 277), wnli=(635, 71)
    )
    assert majority[1:-1] == ["0.0", "50.9", "81.2 / 68.4", "0.0 / 0.0", "52.7", "56.3"] and len(row) == 8
    assert all(r["steps"] == 2 and all(-100 <= s <= 100 for s in r["scores"].values()) for r in records)
