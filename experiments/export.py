"""
A checkpoint of an MHA as a folder that transformers loads: a GPT2LMHeadModel with equal logits, and its tokenizer.

    python -m experiments.export out/mha out/mha/hub

    AutoModelForCausalLM.from_pretrained("out/mha/hub"), AutoTokenizer.from_pretrained("out/mha/hub")

Other systems are refused: transformers has no code for them.
"""

import base64
import os
import tempfile

import torch

import checkpoint
from data import get_tokenizer
from experiments.arguments import parser_with
from guard import UserError, cli
from log import system
from model import GPTConfig

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers stores them as (in, out)


def export_model(model):
    """A GPT2LMHeadModel with the weights of a GPT. Raises UserError if it is no MHA."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("experiments.export needs transformers: pip install transformers") from None
    c, sizes = (
        model.config,
        ("variant", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias", "reversible"),
    )
    mha = GPTConfig()
    if other := [f"{k}={v}" for k, v in vars(c).items() if k in vars(mha) and k not in sizes and v != getattr(mha, k)]:
        raise UserError(f"{system(vars(c))} is no GPT-2, which has none of {', '.join(other)}: export a checkpoint of MHA")
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                   activation_function="gelu", resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    )  # fmt: skip
    state = {
        k: torch.zeros_like(v) for k, v in theirs.state_dict().items() if k.endswith(".bias")
    }  # for a model without biases
    theirs.load_state_dict(state | {k: v.t() if k.endswith(TRANSPOSED) else v for k, v in model.state_dict().items()})
    return theirs.eval()


def export_tokenizer(encoding):
    """A tiktoken.Encoding as a tokenizer of transformers: the same tokens for every text."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ranks")
        with open(path, "wb") as file:
            for token, rank in encoding._mergeable_ranks.items():
                file.write(base64.b64encode(token) + b" %d\n" % rank)
        whole = encoding.name == "bytes"  # whose tokens never merge, so no pattern need cut a text first
        pattern = "$" if whole else encoding._pat_str
        tokenizer = TikTokenConverter(path, pattern=pattern, extra_special_tokens=encoding._special_tokens).converted()
    if whole:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    end = encoding.decode([encoding.eot_token])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False)


def main(arguments):
    parser = parser_with(__doc__, ckpt="best.pt")
    parser.add_argument("out_dir", help="folder of the checkpoint")
    parser.add_argument("folder", help="the folder to write")
    args = parser.parse_args(arguments)
    model, state = checkpoint.load_model(os.path.join(args.out_dir, args.ckpt))
    theirs, encoding = export_model(model), get_tokenizer(state["tokenizer"])
    for config in theirs.config, theirs.generation_config:
        config.bos_token_id = config.eos_token_id = encoding.eot_token
    theirs.config.tiktoken_name = state["tokenizer"]  # for our own programs, which read the folder too
    tokenizer = export_tokenizer(encoding)
    tokenizer.model_max_length = model.config.block_size
    for part in theirs, tokenizer:
        part.save_pretrained(args.folder)
    print(f"{args.folder}: AutoModelForCausalLM and AutoTokenizer load it")


if __name__ == "__main__":
    cli(main)
