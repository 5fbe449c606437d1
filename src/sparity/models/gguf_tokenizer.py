"""The tokenizer that a GGUF file describes, cutting text into words as llama.cpp does."""

from pathlib import Path
from typing import Any

from sparity.checkpoints.gguf_header import Header
from sparity.models import transformers as hf
from sparity.visible import logger

log = logger(__name__)

BYTE_LEVEL = "gpt2"  # as `tokenizer.ggml.model` calls it
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
LIKE_GPT2 = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")


def read(file: Path, header: Header) -> Any:
    """The tokenizer of a GGUF file, or None when it has none.

    transformers gives every byte-level tokenizer that it has no rule for GPT-2's way of cutting text into words. Where
    digits stand alone, that would cut white space before a digit differently, so the rule is put right here.

    Raises:
        InvalidInput: transformers cannot read it.
    """
    if not header.values.get("tokenizer.ggml.tokens") or header.values.get("tokenizer.ggml.model") == "none":
        return None
    tokenizer = hf.load_gguf_tokenizer(file)
    rule = header.values.get("tokenizer.ggml.pre")
    if header.values.get("tokenizer.ggml.model") != BYTE_LEVEL or rule in LIKE_GPT2:
        return tokenizer
    if rule in DIGIT_BY_DIGIT:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule not in hf.gguf_word_rules():
        log.warning(
            "%s: how its tokenizer cuts text into words (%s) is not known here, GPT-2's is taken; where that differs, "
            "the model sees tokens that it was not trained on",
            file,
            rule,
        )
    return tokenizer
