"""What a chat model answers, so that a reader sees what a number means."""

from collections.abc import Sequence
from typing import Any

import torch


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    """The likeliest `tokens` tokens after each prompt, in the model's chat template, each answer on one line."""
    return {prompt: _answer(model, tokenizer, prompt, tokens) for prompt in prompts}


def _answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])  # [1, prompt]
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
    said: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())
