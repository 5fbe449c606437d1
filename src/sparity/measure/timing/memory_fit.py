"""Which batch sizes fit into memory, estimated before anything is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparity.measure.data.bench_report import Skipped
from sparity.measure.show import numbers
from sparity.memory import available_memory

__all__ = ["Fit", "available_memory", "fit", "working_bytes"]

USABLE = 0.9  # of the available memory: other processes move, and the estimate leaves out small things
BFLOAT16, FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Fit:
    """Whether all contenders are held at once, which batch sizes run, and why the others do not."""

    together: bool
    batches: tuple[int, ...]
    skipped: tuple[Skipped, ...]


def fit(weights: Sequence[int], work: dict[int, int], available: int | None) -> Fit:
    """Decide by bytes: `weights` of each contender, `work` by batch size beside them, and what is available.

    All are held at once if the smallest batch fits so; else one after another. Without knowledge of the available
    memory everything is taken to fit.
    """
    if available is None:
        return Fit(True, tuple(work), ())
    room = int(available * USABLE)
    together = sum(weights) + min(work.values()) <= room
    held = sum(weights) if together else max(weights)
    kind = "all contenders" if together and len(weights) > 1 else "the largest contender"
    skipped = tuple(
        Skipped(
            batch,
            f"batch {batch} needs about {numbers.size(need)} beside {numbers.size(held)} of weights of {kind}, and "
            f"{numbers.size(room)} of memory can be used",
        )
        for batch, need in work.items()
        if held + need > room
    )
    left_out = {skip.batch for skip in skipped}
    return Fit(together, tuple(batch for batch in work if batch not in left_out), skipped)


def working_bytes(config: Any, batch: int, prompt: int, tokens: int) -> int:
    """About what generation holds beside the weights: the cache, the widest activations of the prompt, and logits.

    bfloat16; the logits of the last token are also held in float32, twice.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    cached = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    cache = 2 * text.num_hidden_layers * cached * width * (prompt + tokens + 1) * BFLOAT16
    mlp = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    activations = prompt * (3 * mlp + 4 * text.hidden_size) * BFLOAT16
    logits = text.vocab_size * (BFLOAT16 + 2 * FLOAT32)
    return int(batch * (cache + activations + logits))
