"""A transformers Llama written as a GGUF file, of any type that the gguf package can quantise to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: Any,
    path: Path,
    kind: Any = Type.BF16,
    vocabulary: Callable[[Any, int], None] | None = None,
    more: Callable[[Any], None] | None = None,
) -> None:
    """Write a Llama of transformers; tied embeddings are stored once.

    Args:
        kind: the type of every matrix; vectors stay float32.
        vocabulary: a function that adds a tokenizer to the writer; left out, one without text.
        more: a function that adds other values or tensors to the writer.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if kind is Type.BF16:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    (vocabulary or without_text)(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = rotated(tensor, heads)
        if tensor.dim() == 1:
            writer.add_tensor(f"{their_name(stem)}.weight", tensor.float().numpy())
        elif kind is Type.BF16:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{their_name(stem)}.weight", raw, raw_dtype=kind)
        else:
            raw = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(f"{their_name(stem)}.weight", raw, raw_dtype=kind)
    if more:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without_text(writer: Any, size: int) -> None:
    """A vocabulary for models that are only timed."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", *(f"t{number}".encode() for number in range(1, size))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.NORMAL] * (size - 1)])


def their_name(stem: str) -> str:
    """The name of a tensor in GGUF."""
    if stem in OUTSIDE:
        return OUTSIDE[stem]
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}"


def rotated(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp rotates: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
