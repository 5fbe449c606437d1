"""GGUF files for tests: a tiny Llama with a byte-level vocabulary, written by our own writer."""

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparity.models.gguf_writer import write_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "hi"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_llama(tied=True, **changes):
    """A random Llama that a GGUF file can hold: rows of whole blocks of 32, a vocabulary of bytes."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": len(WORDS), **changes},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # of a size at which logits differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def byte_words(rule="smollm"):
    """A byte-level vocabulary whose text is cut into words by a rule that is named."""

    def add(out, size):
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(rule)
        out.add_token_list(WORDS)
        out.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (size - 3))
        out.add_token_merges(["Ġ Ġ", "h i"])
        out.add_bos_token_id(1)
        out.add_eos_token_id(2)
        out.add_unk_token_id(0)
        out.add_pad_token_id(2)
        out.add_add_bos_token(False)
        out.add_chat_template(TEMPLATE)

    return add


def write(path, model=None, kind=Type.F32, rule="smollm", more=None):
    """Write a model, the tiny one by default, as a GGUF file; the path is returned."""
    write_gguf(model or tiny_llama(), path, kind, byte_words(rule), more)
    return path


def dequantised(model, kind):
    """A copy of a model whose matrices are what a GGUF file of a type stores, in bfloat16."""
    copied = LlamaForCausalLM(model.config).eval()
    copied.load_state_dict(model.state_dict())
    for parameter in copied.parameters():
        values = parameter.detach()
        if values.dim() == 2:
            values = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind).copy())
        parameter.data = values.view_as(parameter).bfloat16().float()
    return copied
