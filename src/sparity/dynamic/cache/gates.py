"""Gates for `kvzap`: ridge regressions from hidden states to the logarithm of KVzip+'s scores (arXiv:2601.07891)."""

import torch
from torch import Tensor

from sparity.dynamic.cache.learned import Call, Study
from sparity.dynamic.cache.reconstruction import TINY, looked_at
from sparity.dynamic.cache.run import output_weight_of
from sparity.dynamic.cache.seen import Seen
from sparity.errors import InvalidInput


def fitted_gates(study: Study, ridge: float) -> list[Tensor]:
    """Of each block a gate, float32 `[kv_heads, hidden + 1]`: weights of a hidden state, and a constant.

    Every text is read twice in a row. What a token of the first time is paid the second time is its target.

    Args:
        study: the model and texts.
        ridge: the penalty on the squares of the weights; the constant has none.

    Raises:
        InvalidInput: texts of fewer than 8 tokens, or too long to be read twice.
    """
    texts = twice_read(study)
    length, found = texts.shape[1] // 2, list[Tensor]()
    inputs, targets = list[Tensor](), list[Tensor]()

    def see(call: Call) -> None:
        weight = output_weight_of(call.module, call.query.shape[1])
        seen = Seen(call.query[:, :, length:], call.key, call.value, call.scaling, call.softcap, output_weight=weight,
                    hidden=call.hidden[:, length:])  # fmt: skip
        inputs.append(call.hidden[:, :length].flatten(0, 1).double().cpu())
        scores = looked_at(seen, plus=True)[..., :length].clamp_min(TINY).log()
        targets.append(scores.transpose(1, 2).flatten(0, 1).double().cpu())

    for _ in study.blocks(texts, see):
        found.append(ridge_of(torch.cat(inputs), torch.cat(targets), ridge).float())
        inputs.clear()
        targets.clear()
    return found


def ridge_of(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Weights and a constant, `[outputs, in + 1]`, with the least squares of errors and `ridge` times of weights.

    Args:
        inputs: float64 `[tokens, in]`.
        targets: float64 `[tokens, outputs]`.
        ridge: above 0.
    """
    means, goals = inputs.mean(0), targets.mean(0)
    centred = inputs - means
    gram = centred.T @ centred
    gram.diagonal().add_(ridge)
    weights = torch.linalg.solve(gram, centred.T @ (targets - goals)).T
    return torch.cat([weights, (goals - weights @ means)[:, None]], 1)


def twice_read(study: Study) -> Tensor:
    """The texts, each twice in a row, as long as the model's positions allow.

    Raises:
        InvalidInput: they are shorter than 8 tokens then.
    """
    texts = study.texts()
    positions = getattr(study.decoder.config, "max_position_embeddings", None) or 2 * texts.shape[1]
    length = min(texts.shape[1], int(positions) // 2)
    if length < 8:
        raise InvalidInput(
            f"kvzap learns from texts of 8 tokens or more that fit the model's {positions} positions twice; these have "
            f"{texts.shape[1]}"
        )
    return texts[:, :length].repeat(1, 2)
