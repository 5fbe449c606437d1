"""What a model of the zoo has learned: perplexity, recall by distance, zeros in activations, use of experts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from zoo_data import MIX, Texts

COPY_DISTANCES = (16, 64, 128, 200)
KEY_DISTANCES = (64, 128, 256, 440)


@dataclass(frozen=True)
class Figures:
    """Everything that a model card states of a model."""

    parameters: int
    active: int  # parameters that work on a token
    perplexity: dict[str, float]  # domain -> on its test split
    copied: dict[int, float]  # distance -> share of tokens
    keys: dict[int, float]  # distance -> share of pass keys
    zeros: list[float]  # per layer, of what enters fc2; empty without ReLU
    load: list[list[float]]  # per layer, each expert's share of the tokens' choices; empty without experts


def measure(model: PreTrainedModel, texts: Texts, windows: int = 200, context: int = 512, asked: int = 100) -> Figures:
    """All figures of a model, in the arithmetic that it is in."""
    model.eval()
    parameters = sum(weight.numel() for weight in model.parameters())
    experts = getattr(model.config, "num_local_experts", 0)
    idle = sum(weight.numel() for weight in model.parameters() if weight.ndim == 3)  # fused experts
    used = model.config.num_experts_per_tok / experts if experts else 1
    room = model.config.max_position_embeddings
    return Figures(
        parameters=parameters,
        active=parameters - round(idle * (1 - used)),
        perplexity=perplexities(model, texts, "test", context, windows),
        copied={distance: copied(model, distance, asked // 2) for distance in COPY_DISTANCES if 2 * distance <= room},
        keys={
            distance: keys_told(model, texts, distance, asked) for distance in KEY_DISTANCES if distance + 60 <= room
        },
        zeros=zeros_before_fc2(model, mixed(texts, context)),
        load=expert_load(model, mixed(texts, context)) if experts else [],
    )


def mixed(texts: Texts, context: int) -> Tensor:
    """The first four windows of each domain's test split, [16, context]."""
    pieces = [texts.tokens(domain, "test")[: 4 * context].astype(np.int64).reshape(4, context) for domain in MIX]
    return torch.from_numpy(np.concatenate(pieces))


def perplexities(model: PreTrainedModel, texts: Texts, split: str, context: int, windows: int) -> dict[str, float]:
    """Perplexity on the first `windows` windows of each domain's held-out split."""
    return {domain: round(perplexity(model, texts.tokens(domain, split), context, windows), 2) for domain in MIX}


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: NDArray[Any], context: int, windows: int) -> float:
    """exp of the mean loss of a token, given those before it in its window."""
    losses = []
    for start in range(0, min(windows * context, len(tokens) - context + 1), context):
        ids = torch.from_numpy(tokens[start : start + context].astype(np.int64))[None].to(model.device)
        logits = model(input_ids=ids).logits.float()  # [1, tokens, words]
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(train: NDArray[Any], held_out: NDArray[Any], words: int) -> float:
    """Perplexity of guessing by frequency alone, every word counted once more than it occurs."""
    counts = np.bincount(train, minlength=words) + 1
    return float(np.exp(-np.log(counts / counts.sum())[held_out].mean()))


@torch.no_grad()
def copied(model: PreTrainedModel, distance: int, sequences: int) -> float:
    """Share of tokens foretold when a random segment of `distance` tokens comes again; its first does not count."""
    drawn = np.random.default_rng(distance)
    segments = torch.from_numpy(drawn.integers(1, model.config.vocab_size, size=(sequences, distance)))
    right = 0
    for part in segments.split(16):
        best = model(input_ids=part.repeat(1, 2).to(model.device)).logits[:, distance:-1].argmax(-1).cpu()
        right += (best == part[:, 1:]).sum().item()
    return round(right / (sequences * (distance - 1)), 3)


@torch.no_grad()
def keys_told(model: PreTrainedModel, texts: Texts, distance: int, asked: int) -> float:
    """Share of the pass keys whose every token is the likeliest, `distance` tokens of text after they were told."""
    drawn, right = np.random.default_rng(distance), 0
    for _ in range(asked):
        sequence, answer = texts.pass_key(drawn, distance)
        ids = torch.from_numpy(sequence)[None].to(model.device)
        best = model(input_ids=ids).logits[0, -answer - 1 : -1].argmax(-1)
        right += bool((best == ids[0, -answer:]).all())
    return round(right / asked, 3)


@torch.no_grad()
def zeros_before_fc2(model: PreTrainedModel, ids: Tensor) -> list[float]:
    """Per layer, the share of zeros in what enters `fc2`; empty for a model that has none."""
    shares: list[float] = []

    def count(_: Any, inputs: tuple[Tensor]) -> None:
        shares.append(round((inputs[0] == 0).float().mean().item(), 3))

    layers = [module for name, module in model.named_modules() if name.endswith("fc2")]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    if layers:
        model(input_ids=ids.to(model.device))
    for hook in hooks:
        hook.remove()
    return shares


@torch.no_grad()
def expert_load(model: PreTrainedModel, ids: Tensor) -> list[list[float]]:
    """Per layer, each expert's share of the choices that the router makes."""
    shares = []
    for logits in model(input_ids=ids.to(model.device), output_router_logits=True).router_logits:  # [tokens, experts]
        chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten()
        share = chosen.bincount(minlength=model.config.num_local_experts) / len(chosen)
        shares.append([round(value, 3) for value in share.tolist()])
    return shares
