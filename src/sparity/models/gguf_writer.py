"""A transformers Llama written as a GGUF file, of any type that the gguf package can quantise to.

One size for all blocks is llama.cpp's architecture `llama`. Blocks of different sizes, or without attention, are its
`deci`, which reads the heads and the width of the MLP block by block.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from sparity.errors import UnsupportedModel
from sparity.models.ragged import block_config, is_ragged

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
ATTENTION = ("input_layernorm", "self_attn")  # what is left out of a block whose attention adds nothing


def write_gguf(
    model: Any,
    path: Path,
    kind: Any = Type.BF16,
    vocabulary: Callable[[Any, int], None] | None = None,
    more: Callable[[Any], None] | None = None,
) -> None:
    """Write a Llama of transformers; tied embeddings are stored once.

    Args:
        kind: the type of every matrix whose rows it can hold, float16 for others; vectors stay float32.
        vocabulary: a function that adds a tokenizer to the writer; left out, one without text.
        more: a function that adds other values or tensors to the writer.

    Raises:
        UnsupportedModel: no Llama, or one that the architecture cannot say.
    """
    config, silent = model.config, silent_blocks(model)
    if reason := declines_gguf(config):
        raise UnsupportedModel(f"this model cannot be written as GGUF: {reason}")
    writer = gguf.GGUFWriter(path, "deci" if is_ragged(config) or silent else "llama")
    _describe(writer, config, silent)
    if kind is Type.BF16:
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    (vocabulary or without_text)(writer, config.vocab_size)
    for name, tensor in model.state_dict().items():
        stem, _, part = name.rpartition(".")
        if (stem == "lm_head" and config.tie_word_embeddings) or _is_silent(stem, silent):
            continue
        if stem.endswith(("q_proj", "k_proj")):
            one = block_config(config, int(stem.split(".")[2]))
            tensor = rotated(tensor, one.num_attention_heads if stem.endswith("q_proj") else one.num_key_value_heads)
        _add(writer, f"{their_name(stem)}.{part}", tensor.detach(), kind)
    if more:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def declines_gguf(config: Any) -> str | None:
    """Why a model of a configuration cannot be written; None where it can."""
    if config.model_type != "llama" or config.hidden_act != "silu":
        return f'only Llamas with SiLU are written, not "{config.model_type}" with {config.hidden_act}'
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        return f'rotary positions that are scaled ("{kind}") are not written'
    return None


def silent_blocks(model: Any) -> frozenset[int]:
    """The blocks whose attention writes nothing but zeros; never the first, of which `deci` reads the head's width."""
    return frozenset(
        index
        for index, block in enumerate(model.model.layers)
        if index and not any(bool(value.any()) for value in block.self_attn.o_proj.parameters())
    )


def _describe(writer: Any, config: Any, silent: frozenset[int]) -> None:
    """Sizes and constants: a number for all blocks of `llama`, a list by block for `deci`."""
    blocks = [block_config(config, index) for index in range(config.num_hidden_layers)]
    heads = [0 if index in silent else one.num_attention_heads for index, one in enumerate(blocks)]
    key_heads = [0 if index in silent else one.num_key_value_heads for index, one in enumerate(blocks)]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    listed = writer.arch == "deci"
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(blocks))
    writer.add_feed_forward_length(_said([one.intermediate_size for one in blocks], listed))
    writer.add_head_count(_said(heads, listed))
    writer.add_head_count_kv(_said(key_heads, listed))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _said(sizes: Sequence[int], listed: bool) -> int | list[int]:
    return list(sizes) if listed else sizes[0]


def _is_silent(stem: str, silent: frozenset[int]) -> bool:
    parts = stem.split(".")
    return stem.startswith("model.layers.") and int(parts[2]) in silent and parts[3] in ATTENTION


def _add(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[1] % block:
        kind = Type.F16
    if kind is Type.BF16:
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    else:
        raw = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    writer.add_tensor(name, raw, raw_dtype=kind)


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
    """Rows, or a bias, in the order that llama.cpp rotates: the two halves of each head interleaved."""
    rows = weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2)
    return rows.reshape(weight.shape)
