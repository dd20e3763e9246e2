"""experiments.export: what transformers loads is the same model and the same tokenizer."""

import pytest
import torch

import sample
from conftest import needs, save_run, tiny
from data import get_tokenizer
from experiments import export
from guard import UserError

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_loads_the_same_model(tmp_path, bias, capsys):
    """Equal logits, without biases too, and text that both encode and continue alike."""
    model = tiny(noise=0.3, bias=bias)
    save_run(tmp_path / "run", model)
    export.main([str(tmp_path / "run"), str(tmp_path / "hub")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    idx = tokenizer("Wie schön! <|endoftext|>", return_tensors="pt").input_ids
    assert idx[0].tolist() == [*"Wie schön! ".encode(), 256] and tokenizer.eos_token_id == 256
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], rtol=1e-5, atol=1e-5)
    mine, text = model.generate(idx, 9, temperature=0), theirs.generate(idx, max_new_tokens=9, do_sample=False)
    assert mine[0, : text.size(1)].tolist() == text[0].tolist()
    sample.main([f"--init_from={tmp_path / 'hub'}", "--start=Wie", "--max_new_tokens=1"])  # with the tokenizer that it had
    assert "\nWie" in capsys.readouterr().out


@needs("tiktoken_cache")
def test_gpt2s_tokens_are_the_same():
    """For words, numbers, white space, other scripts and code, there and back."""
    encoding = get_tokenizer("gpt2")
    tokenizer = export.export_tokenizer(encoding)
    for text in ("It's 1,234 words; and more.", "  \n\n\t def f():\n        pass", "слово 東京 🙂 naïve", "a" * 300, " ", ""):
        assert tokenizer(text).input_ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "choice", [dict(variant="NagMHA"), dict(curvature="light"), dict(qk_norm=True), dict(n_loop=2)], ids=str
)
def test_what_transformers_has_no_code_for_is_refused(tmp_path, choice):
    save_run(tmp_path / "run", tiny(**choice))
    with pytest.raises(UserError, match="is no GPT-2, which has none of"):
        export.main([str(tmp_path / "run"), str(tmp_path / "hub")])
    assert not (tmp_path / "hub").exists()
