"""All sequences in one call of the compiled step, each row with as many new tokens as it has.

The engine's products, norms and attention give a token the same bits whatever comes with it (docs/engine.md); it is
only told here which keys and values belong to which row. A row may have no new tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparity.dynamic.cache.attaching import PREFIX
from sparity.engine.decoding.fast_path import Step
from sparity.engine.decoding.model import step_of
from sparity.engine.decoding.rotary import by_length
from sparity.engine.decoding.rotary import tables as rotary_tables
from sparity.engine.kernels.prepared import MANY
from sparity.engine.kernels.step.cpu import CacheView
from sparity.engine.modules.embedding import PackedHead
from sparity.engine.modules.linear import Head
from sparity.errors import InvalidInput
from sparity.memory import check_memory
from sparity.serve.execution.base import Execution, Part

Block = list[tuple[Tensor, Tensor]]  # of each layer, keys and values [kv_heads, tokens, width]


def declines(model: Any) -> str | None:
    """Why sequences cannot be computed together, or None when they can."""
    step = step_of(model)
    if isinstance(step, str):
        return step
    attention = model.config._attn_implementation
    if attention.startswith(PREFIX):
        return "a stage at run time chooses what its cache keeps"
    if attention not in ("sdpa", "eager"):
        return f"attention is {attention}, not sdpa or eager"
    head = model.get_output_embeddings()
    if not isinstance(head, Head | PackedHead) or head.prepared is None or head.prepared.native is None:
        return "its head is not multiplied by the compiled kernels"
    if getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logit_scale", None):
        return "its logits are changed behind the head"
    return None


class Steps(Execution):
    """Sequences in the rows of one batch.

    Args:
        model: for which `declines` gives no reason.
        slots: rows.
        context: tokens of each.
        most: tokens of all rows in a call.

    Raises:
        InvalidInput: so many tokens of so many rows do not fit into memory.
    """

    def __init__(self, model: Any, slots: int, context: int, most: int) -> None:
        self.model, self.slots, self.context, self.most = model, slots, context, most
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.words = f"up to {slots} requests together in steps of the engine, {most} tokens at a time"
        self._by_length = by_length(model.base_model.rotary_emb)
        heads = self._step().heads
        each = sum(kv_heads * width for kv_heads, width in heads) * 2 * 2  # bytes of a token
        self._token_bytes = each
        check_memory(f"a cache of {slots} x {context} tokens", slots * context * each, "lower --slots or --context")
        self._caches = [
            (
                torch.empty(slots, kv_heads, context, width, dtype=torch.bfloat16),
                torch.empty(slots, kv_heads, context, width, dtype=torch.bfloat16),
            )
            for kv_heads, width in heads
        ]
        self._lengths = [torch.zeros(slots, kv_heads, dtype=torch.int64) for kv_heads, _ in heads]
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # rotary tables of prompts, by slot
        with torch.no_grad():
            self._tables = None if self._by_length else self._rotary(torch.arange(context), behind=False)

    @torch.no_grad()
    def run(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Execution.run`: in the order of their slots, which is that of the rows."""
        step, rows = self._step(), sorted(parts)
        fresh = torch.zeros(self.slots, dtype=torch.int64)
        starts = torch.zeros(self.slots, dtype=torch.int64)
        for part in rows:
            fresh[part.slot], starts[part.slot] = len(part.ids), part.start
        for lengths in self._lengths:
            lengths.copy_(starts[:, None])
        views = [CacheView(*cache, lengths) for cache, lengths in zip(self._caches, self._lengths, strict=True)]
        ids = torch.tensor([token for part in rows for token in part.ids])
        cos, sin = zip(*map(self._turned, rows), strict=True)
        embeddings = self.model.base_model.embed_tokens(ids)
        hidden = step.advance(
            embeddings, (torch.cat(cos), torch.cat(sin)), fresh, views, sparse=self._sparse(step, rows)
        )
        ends = torch.tensor([len(part.ids) for part in rows]).cumsum(0).tolist()
        places = [at for part, end in zip(rows, ends, strict=True) for at in range(end - part.wanted, end)]
        found = self._logits(hidden[places])
        given = dict(zip((part.slot for part in rows), torch.split(found, [part.wanted for part in rows]), strict=True))
        return [given[part.slot] for part in parts]

    def free(self, slot: int) -> None:
        """See `Execution.free`."""
        self._own.pop(slot, None)

    def shareable(self, tokens: int, prompt: int, scored: bool) -> int:
        """See `Execution.shareable`.

        Where a stage skips channels behind prompts only, other tokens depend on where the prompt ended; where rotary
        frequencies depend on the length of the prompt, all do.
        """
        skipped = self._step().skipped
        if self._by_length or (scored and skipped is not None):
            return 0
        return tokens if skipped is None or skipped.prompt == "sparse" else min(prompt, tokens)

    def read(self, slot: int, start: int, end: int) -> Block:
        """See `Execution.read`."""
        return [(keys[slot, :, start:end].clone(), values[slot, :, start:end].clone()) for keys, values in self._caches]

    def write(self, slot: int, start: int, block: Block) -> None:
        """See `Execution.write`."""
        for (keys, values), (own_keys, own_values) in zip(self._caches, block, strict=True):
            end = start + own_keys.shape[1]
            keys[slot, :, start:end], values[slot, :, start:end] = own_keys, own_values

    def block_bytes(self, tokens: int) -> int:
        """See `Execution.block_bytes`."""
        return tokens * self._token_bytes

    def _step(self) -> Step:
        step = step_of(self.model)
        if isinstance(step, str):  # somebody changed the model
            raise InvalidInput(f"the model cannot be served any more: {step}")
        return step

    def _logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [any, hidden] -> `[any, vocabulary]` in float32, each as if it came alone."""
        if not len(hidden):
            return torch.empty(0, self.model.config.vocab_size)
        head = self.model.get_output_embeddings()
        return torch.cat([head(some).float() for some in torch.split(hidden, MANY)])

    def _sparse(self, step: Step, rows: Sequence[Part]) -> Tensor | None:
        """Bool `[tokens]`, where channels are skipped: as in `generate` a prompt is dense unless the stage says so."""
        skipped = step.skipped
        if skipped is None:
            return None
        flags = []
        for part in rows:
            dense = 0 if part.scored or skipped.prompt == "sparse" else part.prompt
            flags.append(torch.arange(part.start, part.start + len(part.ids)) >= max(skipped.first, dense))
        return torch.cat(flags)

    def _turned(self, part: Part) -> tuple[Tensor, Tensor]:
        """cos and sin of the tokens of a part, `[tokens, width]`."""
        end = part.start + len(part.ids)
        if self._tables is not None:
            return self._tables[0][part.start : end], self._tables[1][part.start : end]
        if part.start < part.prompt and part.slot not in self._own:
            self._own[part.slot] = self._rotary(torch.arange(part.prompt), behind=False)
        prompt = min(end, part.prompt)
        found = [tuple(table[part.start : prompt] for table in self._own[part.slot])] if part.start < prompt else []
        found += [self._rotary(torch.arange(at, at + 1), behind=True) for at in range(max(part.start, prompt), end)]
        return torch.cat([cos for cos, _ in found]), torch.cat([sin for _, sin in found])

    def _rotary(self, positions: Tensor, behind: bool) -> tuple[Tensor, Tensor]:
        like = torch.empty(1, len(positions), 1, dtype=torch.bfloat16)
        cos, sin = rotary_tables(self.model.base_model.rotary_emb, like, positions[None], behind)
        return cos[0].contiguous(), sin[0].contiguous()
