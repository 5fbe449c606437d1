"""Dense attention under the mask that a policy left: what a cache with a policy must compute."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from sparity.dynamic.cache import attaching
from sparity.dynamic.cache.layer import PolicyLayer

NAME = "masked_dense"


@contextmanager
def recording(monkeypatch):
    """Yields a list; each call of attention that reads from a cache with a policy adds (layer, held places by head)."""
    seen, read = [], PolicyLayer.read

    def recorded(self, *arguments):
        held = [
            [self.store.segment(row, head)[2].tolist() for head in range(self.store.heads)]
            for row in range(self.store.rows)
        ]
        seen.append((self.index, held))
        return read(self, *arguments)

    monkeypatch.setattr(PolicyLayer, "read", recorded)
    yield seen
    monkeypatch.setattr(PolicyLayer, "read", read)


def masked_logits(model, calls, seen, altered=None):
    """Logits of the same calls through transformers' whole cache, with what had been evicted masked.

    `calls` are arguments by name; `seen` is what `recording` gave. `altered(row, held, new, key, value)` gives keys and
    values `[held, width]` of the places that a head holds as they are read.
    """
    records = list(seen)

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
        rows, heads, new, width = query.shape
        group = heads // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        visible = torch.ones(rows, heads, new, key.shape[2], dtype=torch.bool).tril(key.shape[2] - new)
        if attention_mask is not None:
            visible = visible & attention_mask[..., : key.shape[2]]
        if not getattr(module, "sliding", False) and records and records[0][0] == module.layer_idx:
            _, held = records.pop(0)
            for row in range(rows):
                for head in range(heads):
                    gone = torch.ones(key.shape[2], dtype=torch.bool)
                    gone[held[row][head // group]] = False
                    visible[row, head][:, gone] = False
                    if altered is not None:
                        places = held[row][head // group]
                        key[row, head, places], value[row, head, places] = altered(
                            row, places, new, key[row, head, places], value[row, head, places]
                        )
        logits = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible, -1e30)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(rows, heads, new, 1)], -1)
        weights = logits.softmax(-1)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *a, **k: sdpa_mask(*a, **{**k, "allow_is_causal_skip": False}))
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        found = called(model, calls)
    finally:
        model.set_attn_implementation(before)
    assert records == []
    return found


def called(model, calls):
    """Logits of several calls with one cache."""
    past, found = DynamicCache(config=model.config.get_text_config(decoder=True)), []
    with torch.no_grad():
        for call in calls:
            found.append(model(**call, past_key_values=past, use_cache=True).logits)
    return found


def calls_of(pads, *sizes, seed=0, vocabulary=90):
    """Calls that read a text in pieces of the sizes; row i has `pads[i]` tokens of padding in front."""
    total = sum(sizes)
    ids = torch.randint(3, vocabulary, (len(pads), total), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([(torch.arange(total) >= pad).long() for pad in pads])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found, end = [], 0
    for size in sizes:
        start, end = end, end + size
        found.append(
            {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        )
    return found


assert attaching  # the module under test registers its own attention
