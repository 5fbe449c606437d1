"""llama.cpp in the race of `sparity demo`: the dense model's weights as GGUF files of several types."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparity.measure.peers.llama import GgufModel, Llama
from sparity.measure.timing.answers import chat_ids, in_words
from sparity.measure.timing.showdown import ANSWER, Entrant
from sparity.models.gguf_writer import write_gguf
from sparity.models.loading import load

KINDS = ("BF16", "Q8_0", "Q4_0")


def llama_entrants(llama: Llama, dense: Path, place: Path, windows: Tensor, tokenizer: Any) -> Iterator[Entrant]:
    """An entrant per type of GGUF file, quantised by llama.cpp's own code.

    Args:
        llama: what runs them.
        dense: the folder of the dense model, a Llama.
        place: an empty folder for the files.
        windows: ids [windows, window] on which their perplexity is measured.
        tokenizer: the dense model's.
    """
    model = load(dense)
    ends = model.generation_config.eos_token_id
    first = place / f"{KINDS[0]}.gguf"
    write_gguf(model, first)
    for kind in KINDS:
        path, threads = place / f"{kind}.gguf", torch.get_num_threads()
        if path != first:
            llama.quantise(first, path, kind, threads)
        gguf = GgufModel(llama, path, windows.shape[1], threads)
        answer = partial(_answers, gguf, tokenizer, ends if isinstance(ends, list) else [ends])
        yield Entrant(
            f"llama.cpp {kind}", "peer", gguf.perplexity(windows), path.stat().st_size, gguf.time_generation, answer
        )


def _answers(gguf: GgufModel, tokenizer: Any, ends: list[int], prompts: Sequence[str]) -> dict[str, str]:
    return {prompt: in_words(tokenizer, gguf.generate(chat_ids(tokenizer, prompt), ANSWER, ends)) for prompt in prompts}
