"""One sequence after another, by the model's own code, each with a cache of its own.

For models that the engine's step does not know, and for run-time stages that are more than a rule per channel: what
they keep of a sequence lies on its cache (docs/engine.md). A prompt comes in one call, as such stages want it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparity.engine.decoding.rotary import forget
from sparity.serve.execution.base import Execution, Part


class Alone(Execution):
    """Sequences that never meet in a product.

    Args:
        model: any causal language model of transformers, on the CPU.
        slots: sequences that take turns, a token or a prompt each.
        context: tokens of each.
        why: they are not computed together.
    """

    most = None

    def __init__(self, model: Any, slots: int, context: int, why: str) -> None:
        self.model, self.slots, self.context = model, slots, context
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.words = f"one request after another, token by token ({why})"
        self._caches: dict[int, DynamicCache] = {}

    @torch.no_grad()
    def run(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Execution.run`."""
        return [self._one(part) for part in parts]

    def free(self, slot: int) -> None:
        """See `Execution.free`."""
        self._caches.pop(slot, None)

    def _one(self, part: Part) -> Tensor:
        ids = torch.tensor([list(part.ids)])
        forget(getattr(self.model.base_model, "rotary_emb", None))  # what the texts of others left there
        if part.scored:
            cache = None
        elif part.start:
            cache = self._caches[part.slot]
        else:
            cache = self._caches[part.slot] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        found = self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if part.wanted <= 1 else 0,  # other numbers mark drafts
        )
        logits: Tensor = found.logits[0, len(found.logits[0]) - part.wanted :]
        return logits.float()
