"""llama.cpp beside us: the weights of a transformers Llama as GGUF files, and decoding timed in llama-cpp-python."""

import ctypes

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from sparity.measure.timing.generation import Stamps

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
FILE_TYPES = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def write_gguf(model, path):
    """A Llama of transformers in bfloat16, with a vocabulary without text."""
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", *(f"t{number}".encode() for number in range(1, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.NORMAL] * (config.vocab_size - 1)])
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = rotated(tensor, heads)
        if tensor.dim() == 1:
            writer.add_tensor(f"{their_name(stem)}.weight", tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(f"{their_name(stem)}.weight", raw, raw_dtype=Type.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def their_name(stem):
    """The name of a tensor in GGUF."""
    if stem in OUTSIDE:
        return OUTSIDE[stem]
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}"


def rotated(weight, heads):
    """Rows in the order that llama.cpp rotates: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def check_same(model, path):
    """Stop unless llama.cpp's logits are the model's, up to rounding."""
    ids = list(range(1, 33))
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].float()
    other = llama_cpp.Llama(str(path), n_ctx=len(ids), logits_all=True, verbose=False)
    other.eval(ids)
    theirs = torch.from_numpy(np.array(other.scores[: len(ids)]))
    likeness = float(torch.nn.functional.cosine_similarity(ours, theirs).min())
    if likeness < 0.99:
        raise SystemExit(f"{path}: llama.cpp computes something else, likeness {likeness:.4f}")


def quantise(source, target, kind, threads):
    """Write a quantised copy of a GGUF file with llama.cpp's own code."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[kind]
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}")


class LlamaCpp:
    """A GGUF file in memory, timed like our own models: greedy, batch 1."""

    def __init__(self, path, context, threads):
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False
        )

    def generate(self, ids, tokens):
        """Seconds to the first token and at the median per token of `tokens` more, after a prompt [1, prompt]."""
        self._llama.reset()
        stamps = Stamps()
        stamps.put(ids)
        given = ids[0].tolist()
        for _ in range(tokens + 1):
            self._llama.eval(given)
            given = [int(self.logits().argmax())]
            stamps.put(given)
        return stamps.timed()

    def logits(self):
        """Of the last token [vocabulary]."""
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))
