"""experiments.evaluate: the harness is told what the model itself says, token by token; and the command around it."""

import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import checkpoint
import conftest
from conftest import SHARED, needs, save_run, tiny
from data import get_tokenizer
from experiments import evaluate
from guard import UserError
from model import GPT, VARIANTS, GPTConfig

T, EOT = 16, 256


def untrained(**choices):
    """A tiny GPT over bytes in float64, with weights so large that its tokens differ in probability."""
    model = tiny(**dict(block_size=T, vocab_size=260) | choices).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


@pytest.fixture(scope="module")
def trained():
    """A GPT that has learned to count to ten, over and over, so that what it writes is text."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=260))
    text = torch.tensor(list(b"one two three four five six seven eight nine ten " * 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):  # enough for answers that rounding does not change
        rows = torch.stack([text[i : i + T + 1] for i in torch.randint(len(text) - T, (16,)).tolist()])
        rows[::4, 0] = EOT  # a document may begin anywhere
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def adapter(model, batch_size=16):
    return evaluate.Adapter(model, get_tokenizer("bytes"), batch_size)


def instances(*arguments):
    return [Instance("loglikelihood", {}, a, 0) for a in arguments]


@torch.no_grad()
def predict(model, seen, token):
    """The log probability of one token after those seen, and whether it is the likeliest."""
    p = model(torch.tensor([seen]))[0][0, -1].softmax(-1)
    return math.log(p[token]), p.argmax().item() == token


def direct(model, context, continuation):
    """
    The same for a continuation, with one forward pass per token. One of at most T tokens lies in one window, the last T + 1
    tokens of it all. A longer one is cut into windows of T tokens from its start on; the last window ends where it ends.
    """
    before, tokens = list(context.encode()) or [EOT], list(continuation.encode())
    everything, n = before + tokens, len(tokens)
    last = len(everything) - T - 1
    parts = []
    for i, token in enumerate(tokens):
        whole = n > T and i // T < n // T
        first = len(before) - 1 + i // T * T if whole else max(last, 0)
        parts.append(predict(model, everything[first : len(before) + i], token))
    return sum(logp for logp, _ in parts), all(greedy for _, greedy in parts)


def greedy_text(model, context, n):
    prompt = list(context.encode()) or [EOT]
    return bytes(model.generate(torch.tensor([prompt]), n, temperature=0)[0, len(prompt) :].tolist()).decode()


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_likelihoods_are_those_of_the_model_alone(variant):
    """In batches, padded, against one token at a time; contexts that are empty, full, too long, or end in a space."""
    model = untrained(variant=variant)
    pairs = [("", "a"), ("", "longer than that"), ("a", "b"), ("a b ", "c"), ("w" + "x" * (T - 2), "y"), ("x" * T, "y"),
             ("ü", "ß é"), ("0123456789" * 4, " tail"), ("0123456789" * 4, "exactly sixteen."), ("ab", "cd" * 7)]  # fmt: skip
    expected = [direct(model, *pair)[0] for pair in pairs]
    # the space that ends a context belongs to the continuation, says the harness
    expected[3] = direct(model, "a b", " c")[0]
    for batch_size in (1, 3, 16):
        found = adapter(model, batch_size).loglikelihood(instances(*pairs), disable_tqdm=True)
        assert [logp for logp, _ in found] == pytest.approx(expected, rel=1e-9)
    assert len({round(logp, 3) for logp in expected}) == len(pairs)


def test_greedy_is_what_generate_takes(trained):
    pairs = []
    for context in ("three ", "", "five six seven eig"):
        text = greedy_text(trained, context, 5)
        context, text = context.rstrip(), " " * context.endswith(" ") + text
        wrong_first, wrong_last = "#" + text[1:], text[:-1] + "#"
        pairs += [(context, text), (context, wrong_first), (context, wrong_last)]
    found = [greedy for _, greedy in adapter(trained, 4).loglikelihood(instances(*pairs), disable_tqdm=True)]
    assert found == [direct(trained, *pair)[1] for pair in pairs]
    assert found[3:] == [True, False, False] * 2
    # of a long one every window counts
    long = "one " * 4 + greedy_text(trained, " ", T)
    ((_, greedy),) = adapter(trained).loglikelihood(instances(("1", long)), disable_tqdm=True)
    assert not greedy and not direct(trained, "1", long)[1] and direct(trained, " ", long[T:])[1]


@pytest.mark.parametrize("n", [1, T - 1, T, T + 1, 2 * T, 2 * T + 5, 5 * T - 1])
def test_a_rolling_log_likelihood_counts_every_token_once(n):
    model, text = untrained(), "".join(chr(33 + i * i % 90) for i in range(n))
    expected = direct(model, "", text)[0]
    for batch_size in (1, 4):
        assert adapter(model, batch_size).loglikelihood_rolling(instances((text,)), True) == pytest.approx([expected], rel=1e-9)
    # a continuation that doesn't fit is treated in the same way
    found = adapter(model).loglikelihood(instances(("", text), ("two", text)), disable_tqdm=True)
    assert [logp for logp, _ in found] == pytest.approx([expected, direct(model, "two", text)[0]], rel=1e-9)
    tokens = list(text.encode())
    inputs, targets = (sum(rows, []) for rows in zip(*adapter(model).windows([EOT], tokens), strict=True))
    assert [t for t in targets if t != -1] == tokens
    assert [x for x, t in zip(inputs, targets, strict=True) if t != -1] == [EOT, *tokens[:-1]]
    assert all(len(x) <= T for x, _ in adapter(model).windows([EOT], tokens))


def test_texts_keep_their_order_and_an_empty_one_costs_nothing():
    lm = adapter(untrained(), 2)
    texts = ["ab", "", "abc" * 30, "a"]
    together = lm.loglikelihood_rolling(instances(*((text,) for text in texts)), True)
    assert together == pytest.approx([lm.loglikelihood_rolling(instances((text,)), True)[0] for text in texts], rel=1e-9)
    assert together[1] == 0 and len(set(together)) == 4


def test_generation_stops_before_its_stop_string(trained):
    def write(*requests):
        return adapter(trained).generate_until(instances(*requests), disable_tqdm=True)

    for context in ("three ", "", "seven eight nine ten one "):
        whole = greedy_text(trained, context, 30)
        assert len(set(whole)) > 3
        stop = whole[7:9]
        assert write((context, dict(max_gen_toks=30))) == [whole]
        for choices in (dict(until=[stop, "never"]), dict(until=stop, do_sample=False, temperature=0.7)):
            assert write((context, choices | dict(max_gen_toks=30))) == [whole[: whole.index(stop)]]
        for one in (dict(top_k=1), dict(top_p=1e-9, top_k=-1)):
            assert write((context, dict(max_gen_toks=30, do_sample=True) | one), (context, dict(max_gen_toks=3))) == [
                whole,
                whole[:3],
            ]
    torch.manual_seed(1)
    for choices in (dict(do_sample=True), dict(temperature=2.0)):
        assert len(set(write(*[("three ", choices | dict(max_gen_toks=30))] * 3))) == 3


def test_generation_ends_with_the_text(trained, monkeypatch):
    whole = greedy_text(trained, "three ", 30)
    end = next(c for c in whole if c != whole[0])
    monkeypatch.setattr(evaluate.Adapter, "eot_token_id", ord(end))
    assert adapter(trained).generate_until(instances(("three ", dict(max_gen_toks=30))), True) == [whole[: whole.index(end)]]


def test_rows_of_the_table_that_are_no_tokens_are_not_written():
    model = untrained()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[258] * 100)
    assert adapter(model).generate_until(instances(("a", dict(max_gen_toks=5))), True) == [""]


def test_bars_are_shown_only_where_they_are_wanted(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for disable_tqdm, shown in ((True, False), (False, True)):
        lm = adapter(trained)
        lm.loglikelihood_rolling(instances(("a",)), disable_tqdm=disable_tqdm)
        assert ("window" in capsys.readouterr().err) == shown
        lm.generate_until(instances(("a", dict(max_gen_toks=1))), disable_tqdm=disable_tqdm)
        assert ("text" in capsys.readouterr().err) == shown


@pytest.mark.slow
def test_the_harness_own_adapter_finds_the_same(tmp_path, monkeypatch):
    """transformers' GPT-2 behind the harness's HFLM, against its weights in our model; HFLM's tokens are bytes as well."""
    transformers = pytest.importorskip("transformers")
    for name in ("accelerate", "accelerate.utils"):  # which HFLM imports, and uses for several processes only
        monkeypatch.setitem(sys.modules, name, MagicMock())
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=T, vocab_size=257, activation_function="gelu",
                                     bos_token_id=EOT, eos_token_id=EOT)  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    theirs.save_pretrained(tmp_path)
    # GPT-2's printable names of the bytes, and no merges
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(b) if b in printable else chr(256 + b - sum(p < b for p in printable)) for b in range(256)]
    vocab = {name: b for b, name in enumerate(names)} | {"<|endoftext|>": EOT}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[])
    assert tokenizer.encode(" ü\n") == list(" ü\n".encode())
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=3, device="cpu")

    choices, weights, _ = checkpoint.gpt2(str(tmp_path))
    model = GPT(GPTConfig(**choices)).eval()
    model.load_state_dict(weights)
    lm = adapter(model, 4)

    pairs = [("", "a"), ("a", "b"), ("a b ", "c"), ("0123456789" * 4, " tail"), ("ü", "ß"), ("q" * T, "r" * T), ("x", "yz" * 4)]
    pairs.append(("ab", greedy := hf.generate_until(instances(("ab", dict(max_gen_toks=4, until=[]))), True)[0]))
    mine, others = lm.loglikelihood(instances(*pairs), True), hf.loglikelihood(instances(*pairs), True)
    assert [logp for logp, _ in mine] == pytest.approx([logp for logp, _ in others], rel=1e-4)
    assert [best for _, best in mine] == [best for _, best in others]
    texts = [("a",), ("0123456789",), ("0123456789" * 5,), ("0123456789abcdef" * 3,)]
    mine, others = (adapter.loglikelihood_rolling(instances(*texts), True) for adapter in (lm, hf))
    assert mine == pytest.approx(others, rel=1e-4)
    assert lm.generate_until(instances(("ab", dict(max_gen_toks=4))), True) == [greedy]


# the command


@pytest.fixture
def run(tmp_path, trained):
    save_run(tmp_path, trained, step=60)
    return tmp_path


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Only the tasks that are used, since to look through all takes ten seconds; and a cache of its own."""
    folders = [Path(lm_eval.__file__).parent / "tasks" / name for name in ("arc", "hellaswag")]
    manager = TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(evaluate, "task_manager", lambda: manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def command(run, *arguments):
    evaluate.main([str(run), "--out", str(run / "evaluate.json"), "--device", "cpu", *map(str, arguments)])
    return json.loads((run / "evaluate.json").read_text())


def test_perplexity_of_a_file(run, trained, capsys, monkeypatch):
    text = "12 13 14 15 16 17 ünd so weiter\r\n"
    (run / "text").write_text(text, encoding="utf-8", newline="")
    (record,) = command(run, "--text", run / "text")
    tokens = list(text.encode())
    (total,) = adapter(trained).loglikelihood_rolling(instances((text,)), True)
    perplexity, bits = (m["value"] for m in record["metrics"])
    assert perplexity == pytest.approx(math.exp(-total / len(tokens)))
    assert bits == pytest.approx(math.log2(perplexity))  # a byte is a token
    assert record["n"] == len(tokens) and record["step"] == 60
    shown = capsys.readouterr().out
    assert f"| MHA | 60 | {run / 'text'} | {len(tokens)} tokens | bits per byte | {bits:.4f} |" in shown

    # the same question isn't computed again; another text or another checkpoint is
    def fail(*_):
        raise AssertionError

    with monkeypatch.context() as m:
        m.setattr(evaluate.Adapter, "loglikelihood_rolling", fail)
        assert command(run, "--text", run / "text") == [record]
        assert capsys.readouterr().out == shown
    (run / "text").write_text("12 13 14")
    assert len(command(run, "--text", run / "text")) == 2
    state = checkpoint.load(run / "best.pt")
    state["model"]["transformer.ln_f.weight"] *= 1.1
    checkpoint.save(run, state, best=True)
    _, one, other = command(run, "--text", run / "text")
    assert one["metrics"] != other["metrics"]


@pytest.mark.parametrize("name, bytes_per_token", [("bytes", 1), ("gpt2", 5)])
def test_bits_are_over_bytes_and_perplexity_over_tokens(name, bytes_per_token, monkeypatch):
    """Of a model that finds all tokens equally likely. " book" is one of GPT-2's."""
    try:
        tokenizer = get_tokenizer(name)
    except UserError as error:
        pytest.skip(str(error))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=tokenizer.n_vocab)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    text = " book" * 20
    found = evaluate.evaluate_text(evaluate.Adapter(model, tokenizer), text)
    assert found["n"] == len(text) // bytes_per_token
    perplexity, bits = (m["value"] for m in found["metrics"])
    assert perplexity == pytest.approx(tokenizer.n_vocab, rel=1e-4)
    assert bits == pytest.approx(math.log2(tokenizer.n_vocab) / bytes_per_token, rel=1e-4)


def arc(folder, docs):
    """A copy of ARC-Easy in the hub's layout that has a test split only."""
    rows = [dict(id=str(i), question=q, choices=dict(text=c, label=list("ABCDE"[: len(c)])), answerKey=a)
            for i, (q, c, a) in enumerate(docs)]  # fmt: skip
    (folder / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    (folder / "ai2_arc" / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n  - split: test\n    path: ARC-Easy/test-*\n---\n"
    )
    datasets.Dataset.from_list(rows).to_parquet(folder / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet")


def preferred(model, question, choices):
    """The letters of the answers to ARC's question that a model prefers, by log probability and by that per character."""
    scores = [direct(model, f"Question: {question}\nAnswer:", " " + choice)[0] for choice in choices]
    by_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    return ["ABCDE"[values.index(max(values))] for values in (scores, by_character)]


def accuracies(model, docs):
    """acc and acc_norm of ARC's questions, written out."""
    letters = zip(*(preferred(model, question, choices) for question, choices, _ in docs), strict=True)
    return [sum(a == answer for a, (*_, answer) in zip(all_, docs, strict=True)) / len(docs) for all_ in letters]


def test_a_task_from_a_local_copy(run, quick, trained, capsys):
    """Questions with three, four and five answers, for which guessing is right in 47 of 180 cases."""
    questions = [("one two", ["three four", "zzz", "#!"]), ("five six", ["seven", "zz9", "four", "Q"]),
                 ("nine ten", ["one", "X", "Y", "Z", "#"])]  # fmt: skip
    first, *others = (preferred(trained, *question)[0] for question in questions)
    answers = [first, *("B" if letter == "A" else "A" for letter in others)]  # so the model knows the first one alone
    docs = [(*question, answer) for question, answer in zip(questions, answers, strict=True)]
    acc, acc_norm = accuracies(trained, docs)
    assert acc == 1 / 3
    arc(run / "hub", docs)
    (record,) = command(run, "--tasks", "arc_easy", "--data", run / "hub")
    metrics = {m["metric"]: m for m in record["metrics"]}
    assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == pytest.approx((acc, acc_norm))
    assert metrics["acc"]["chance"] == pytest.approx(47 / 180) and record["n"] == 3
    assert metrics["acc_norm"]["stderr"] == pytest.approx(math.sqrt(acc_norm * (1 - acc_norm) / 2))
    assert f"| acc | {acc:.4f} ± {metrics['acc']['stderr']:.4f} | 0.2611 |" in capsys.readouterr().out
    # another question, so both are kept
    records = command(run, "--tasks", "arc_easy", "--data", run / "hub", "--limit", 2)
    assert [r["n"] for r in records] == [3, 2] and records[0] == record


def test_groups_and_examples(run, quick):
    """A tag stands for its tasks; with examples the context of a question holds them, and the record says how many."""
    docs = [("one two", ["three four", "zzz", "#!"], "C"), ("five six", ["seven", "zz9", "four", "Q"], "A")]
    arc(run / "hub", docs)
    folder = run / "hub" / "ai2_arc"
    shutil.copytree(folder / "ARC-Easy", folder / "ARC-Challenge")
    readme = (folder / "README.md").read_text()
    easy = readme.split("configs:\n")[1].split("---")[0] + "  - split: train\n    path: ARC-Easy/test-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{easy}{easy.replace('ARC-Easy', 'ARC-Challenge')}---\n")
    both = command(run, "--tasks", "ai2_arc", "--data", run / "hub")
    assert [r["task"] for r in both] == ["arc_challenge", "arc_easy"]
    *_, shots = command(run, "--tasks", "arc_easy", "--data", run / "hub", "--num_fewshot", 1)
    assert [r["num_fewshot"] for r in (*both, shots)] == [0, 0, 1]
    assert len(command(run, "--tasks", "ai2_arc", "--data", run / "hub")) == 3  # each is known by its number of examples
    task = evaluate.get_task("arc_easy", str(run / "hub"), 1)
    task.build_all_requests(limit=2, rank=0, world_size=1)
    assert all(i.args[0].count("Question:") == 2 for i in task.instances)


def test_what_is_wrong_is_said(run, quick):
    (run / "empty").write_text("")
    (run / "latin").write_bytes(b"\xff\xfe\xfd")
    (run / "text").write_text("a")
    for arguments, said in (
        ([], "nothing to evaluate"),
        (["--tasks", "arc_easy", "--limit", 0], "limit 0 must be at least 1"),
        (["--text", run / "text", "--batch_size", 0], "batch_size 0 must be at least 1"),
        (["--tasks", "arc_easy", "--num_fewshot", "-1"], "num_fewshot -1 must be at least 0"),
        (["--tasks", "arc_eazy"], "no task or group named arc_eazy; it has arc_easy"),
        (["--tasks", "arc_easy", "--data", run], "no copy of arc_easy's data"),
        (["--text", run / "missing"], "cannot read the text"),
        (["--text", run / "latin"], "cannot read the text"),
        (["--text", run / "empty"], "empty"),
        (["--text", run / "text", "--ckpt", "none.pt"], "no checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            command(run, *arguments)
    (run / "hub" / "ai2_arc").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot load the task arc_easy"):
        command(run, "--tasks", "arc_easy", "--data", run / "hub")
    (run / "evaluate.json").write_text("[{")
    with pytest.raises(UserError, match="evaluate.json is not a JSON"):
        command(run, "--text", run / "text")


@needs("hellaswag", "ai2_arc")
@pytest.mark.slow
def test_the_command_on_hellaswag_and_arc(run, trained):
    """As a process of its own, with all the harness's tasks to choose from; twice, the second time from its records."""
    arguments = [run, "--tasks", "hellaswag,arc_easy", "--data", SHARED, "--limit", 8, "--out", run / "out" / "evaluate.json"]
    tables = [conftest.run("-m", "experiments.evaluate", *arguments, HF_HOME=str(run / "hf")) for _ in range(2)]
    assert tables[0] == tables[1]
    hellaswag, arc_easy = json.loads((run / "out" / "evaluate.json").read_text())
    assert [(m["metric"], m["chance"]) for m in hellaswag["metrics"]] == [("acc", 0.25), ("acc_norm", 0.25)]
    assert hellaswag["n"] == arc_easy["n"] == 8
    docs = datasets.load_dataset(str(SHARED / "ai2_arc"), "ARC-Easy", split="test[:8]", cache_dir=str(run / "cache"))
    docs = [(d["question"], d["choices"]["text"], "ABCDE"[d["choices"]["label"].index(d["answerKey"])]) for d in docs]
    assert [m["value"] for m in arc_easy["metrics"]] == pytest.approx(accuracies(trained, docs))
