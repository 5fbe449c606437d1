"""A text in a batch, padded on the left, beside the same text alone."""

import torch


def padded_and_alone(model, ids, pad, **options):
    """Generated from two rows of which the second has `pad` places of padding, and from that row alone.

    Each row's tokens are those of the row alone.
    """
    options = {"return_dict_in_generate": True, **options}
    length = ids.shape[1]
    alone = ids[1:, : length - pad]
    rows = torch.stack([ids[0], torch.cat([torch.zeros(pad, dtype=torch.int64), alone[0]])])
    mask = torch.stack([torch.ones(length), (torch.arange(length) >= pad).float()]).long()
    both = model.generate(rows, attention_mask=mask, **options)
    one, other = model.generate(alone, **options), model.generate(ids[:1], **options)
    assert both.sequences[1, pad:].tolist() == one.sequences[0].tolist()
    assert both.sequences[0].tolist() == other.sequences[0].tolist()
    return both, one
