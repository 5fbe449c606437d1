"""Dense attention under the masks that LazyLLM's choices leave: what a model with it must compute."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sparity.dynamic.cache.layer import PolicyLayer


@contextmanager
def recording(monkeypatch):
    """Yields a list; every layer that computes only some tokens adds (layer, their places, which are real, read)."""
    seen, before = [], PolicyLayer.read

    def recorded(self, module, query, sight, *rest):
        passing = self.run.passing
        if passing is not None and passing.narrowed:
            seen.append((self.index, passing.places.clone(), passing.held.clone(), passing.read(sight)))
        return before(self, module, query, sight, *rest)

    monkeypatch.setattr(PolicyLayer, "read", recorded)
    yield seen
    monkeypatch.setattr(PolicyLayer, "read", before)


def masked_logits(model, calls, seen):
    """Logits of the whole text in one call without a cache: a token sees in a layer what it saw when computed."""
    ids, positions = (torch.cat([call[name] for call in calls], 1) for name in ("input_ids", "position_ids"))
    mask, length = calls[-1]["attention_mask"], ids.shape[1]
    whole = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None].bool()
    visible = {index: whole.clone() for index in range(model.config.num_hidden_layers)}
    for index, places, held, read in seen:
        for row, slot in held.nonzero().tolist():
            place = places[row, slot]
            visible[index][row, place] = False
            visible[index][row, place, : place + 1] = read[row, : place + 1]

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        group, width = query.shape[1] // key.shape[1], query.shape[3]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        weights = logits.masked_fill(~visible[module.layer_idx][:, None], -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("visible", attention)
    AttentionMaskInterface.register("visible", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("visible")
    try:
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
