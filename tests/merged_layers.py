"""What MiniCache leaves of two layers, in NumPy, token by token, and dense attention over it."""

import numpy as np
import torch
from transformers import DynamicCache

import sparity

ENDS = {"sinks": 2, "recent": 4}
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))


def minicache(model, **options):
    return sparity.cache(model, "minicache", **{"retain": 0.3, **ENDS, **options})


def between(first, second, share):
    """Angle and direction of two float64 vectors, by the formula of the paper."""
    one, other = first / np.linalg.norm(first), second / np.linalg.norm(second)
    angle = np.arccos(np.clip(one @ other, -1, 1))
    return angle, (np.sin((1 - share) * angle) * one + np.sin(share * angle) * other) / np.sin(angle)


def merged(first, second, candidates, retain, share=0.6):
    """What one head's tokens are read as, and which were merged.

    `first` and `second` are [keys, values] of both layers, float64 `[tokens, width]`; `candidates` are places.
    """
    found, far = [[x.copy() for x in layer] for layer in (first, second)], set()
    for kind in (0, 1):
        angle = [between(first[kind][i], second[kind][i], share)[0] for i in candidates]
        low, high = min(angle, default=0), max(angle, default=0)
        far |= {i for i, each in zip(candidates, angle, strict=True) if each > high - retain * (high - low)}
    gone = [i for i in candidates if i not in far]
    for kind in (0, 1):
        for i in gone:
            direction = between(first[kind][i], second[kind][i], share)[1]
            for layer, states in enumerate((first, second)):
                found[layer][kind][i] = np.linalg.norm(states[kind][i]) * direction
    return found, gone


def dense_calls(model, calls, pairs, retain, sinks, recent, pads):
    """Logits of calls through transformers' whole cache, which is altered in NumPy after each prompt."""
    past, found, judged, length = DynamicCache(config=model.config), [], 0, 0
    for call in calls:
        with torch.no_grad():
            found.append(model(**call, past_key_values=past).logits)
        new = call["input_ids"].shape[1]
        length += new
        if new < length and new < 32:
            continue
        for earlier, later in pairs:
            layers = past.layers[earlier], past.layers[later]
            for row, pad in enumerate(pads):
                candidates = range(max(pad + sinks, judged), length - recent)
                for head in range(layers[0].keys.shape[1]):
                    arrays = [[x[row, head].double().numpy() for x in (each.keys, each.values)] for each in layers]
                    for layer, own in zip(layers, merged(*arrays, candidates, retain)[0], strict=True):
                        layer.keys[row, head], layer.values[row, head] = (torch.tensor(x).float() for x in own)
        judged = length - recent
    return found
