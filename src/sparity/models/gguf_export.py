"""A checkpoint as a GGUF file with its tokenizer, for llama.cpp; blocks may differ in size."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from sparity.errors import InvalidInput, UnsupportedModel
from sparity.files import disk_errors
from sparity.models.gguf_writer import without_text, write_gguf
from sparity.models.loading import load_plain, load_tokenizer

KINDS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS + r"\p{N}{1,3}" + REST: "llama-bpe", WORDS + r"\p{N}" + REST: "qwen2"}  # llama.cpp's names of rules


def export_gguf(source: str | Path, target: Path, force: bool = False) -> None:
    """Write a Llama's checkpoint, plain or packed, as one GGUF file in the type of its weights.

    Raises:
        InvalidInput: the file is there already and `force` is not set.
        UnsupportedModel: no Llama, or a tokenizer of which llama.cpp's name is not known.
        SparityError: the model cannot be read, or the disk is full.
    """
    if target.exists() and not force:
        raise InvalidInput(f"{target} is there already: --force replaces it")
    model, tokenizer = load_plain(source, "cpu", "auto"), load_tokenizer(source)
    kind = KINDS.get(model.dtype, Type.F32)
    vocabulary = without_text if tokenizer is None else partial(add_vocabulary, tokenizer)
    partial_file = target.with_name(f".{target.name}.partial")
    with disk_errors(target):
        try:
            write_gguf(model, partial_file, kind, vocabulary, _file_type(kind))
            partial_file.rename(target)
        finally:
            partial_file.unlink(missing_ok=True)


def _file_type(kind: Any) -> Callable[[Any], None] | None:
    named = {Type.F32: gguf.LlamaFileType.ALL_F32, Type.F16: gguf.LlamaFileType.MOSTLY_F16}
    return (lambda writer: writer.add_file_type(named[kind])) if kind in named else None


def add_vocabulary(tokenizer: Any, writer: Any, size: int) -> None:
    """Add a byte-level tokenizer with `size` tokens, its special tokens and its chat template to a GGUF file.

    Raises:
        UnsupportedModel: another kind of tokenizer, or a rule of cutting words whose name is not known.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = word_rule(described)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {each["id"]: each["special"] for each in described["added_tokens"]}
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(
        [kinds[special.get(number)] if number in by_id else gguf.TokenType.UNUSED for number in range(size)]
    )
    merges = described["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(begins)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def word_rule(described: Any) -> str:
    """llama.cpp's name of the rule by which a tokenizer, described as in tokenizer.json, cuts text into words.

    Raises:
        UnsupportedModel: it is not known.
    """
    if described["model"]["type"] != "BPE" or described.get("normalizer") is not None:
        raise UnsupportedModel(
            "only byte-level BPE tokenizers without a normalizer are written as GGUF: convert the model with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    before = described["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(parts[0]["pattern"].get("Regex", ""))):
        return name
    raise UnsupportedModel(
        f"how this tokenizer cuts text into words ({', '.join(map(str, kinds))}) has no name in llama.cpp that is "
        "known here: convert the model with llama.cpp's convert_hf_to_gguf.py"
    )
