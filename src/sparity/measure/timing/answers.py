"""What a chat model answers, so that a reader sees what a number means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    """The likeliest `tokens` tokens after each prompt, in the model's chat template, each answer on one line."""
    return {prompt: _answer(model, tokenizer, prompt, tokens) for prompt in prompts}


def _answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = chat_ids(tokenizer, prompt)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
    return in_words(tokenizer, made[0, ids.shape[1] :])


def chat_ids(tokenizer: Any, prompt: str) -> Tensor:
    """What a user asks, in the chat template and up to where the model answers: ids `[1, prompt]`."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])


def in_words(tokenizer: Any, ids: Any) -> str:
    """1-D ids as text on one line, without special tokens."""
    said: str = tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(said.split())
