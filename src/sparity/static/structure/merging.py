"""Experts merged: which belong together, which of their neurons correspond, and their weighted mean."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from sparity.calibration import Visit
from sparity.models.cuts.experts import experts_module
from sparity.models.experts import expert_matrices
from sparity.static.structure.experts import expert_neurons, expert_output, watched_routes

Groups = dict[int, list[int]]  # the expert that stays -> those that are merged, itself first


@dataclass
class Observed:
    """A block's experts on all its tokens.

    Attributes:
        outputs: the mean of softmax weight times output over tokens, `[experts, hidden]`.
        logits: of the router, `[tokens, experts]`.
        neurons: what the neurons give on the first tokens, `[experts, tokens, inner]`.
    """

    outputs: Tensor
    logits: Tensor
    neurons: Tensor

    @classmethod
    def of(cls, visit: Visit, most: int) -> "Observed":
        """From a pass of its own through a block with experts, neurons on up to `most` tokens."""
        experts = experts_module(visit.block)
        assert experts is not None, "a block without experts has none to merge"
        count = len(experts.get_parameter("gate_up_proj"))
        total = torch.zeros(count, int(visit.hidden.shape[-1]))
        logits: list[Tensor] = []
        kept: list[Tensor] = []

        def see(hidden: Tensor, chosen: Tensor, weights: Tensor, found: Tensor) -> None:
            soft = found.softmax(-1)
            for expert in range(count):
                total[expert] += (expert_output(experts, expert, hidden) * soft[:, expert, None]).sum(0).cpu()
            logits.append(found.cpu())
            if sum(part.shape[0] for part in kept) < most:
                kept.append(hidden)

        with torch.no_grad(), watched_routes(visit.block, see):
            visit.block.run(visit.inputs, visit.hidden)
            tokens = torch.cat(kept)[:most]
            neurons = torch.stack([expert_neurons(experts, expert, tokens).cpu() for expert in range(count)])
        return cls(total / sum(part.shape[0] for part in logits), torch.cat(logits), neurons)

    def similarity(self) -> Tensor:
        """Of every two experts, from 0 to 1: the mean of that of their outputs and that of their router logits."""
        outputs = (cosine_similarity(self.outputs[:, None], self.outputs[None], dim=-1) + 1) / 2
        gates = normalize(self.logits.T, dim=-1)
        distances = torch.cdist(gates, gates)
        return (outputs + 1 - distances / distances.max().clamp_min(1e-12)) / 2


def grouped(saliency: Tensor, similarity: Tensor, centres: list[int], size: int) -> Groups:
    """Groups of at most `size`: the most salient centre takes the most similar of the others, then the next."""
    groups: Groups = {centre: [centre] for centre in centres}
    free = [expert for expert in range(len(saliency)) if expert not in groups]
    for centre in sorted(centres, key=lambda expert: -float(saliency[expert])):
        nearest = sorted(free, key=lambda expert: -float(similarity[centre, expert]))[: size - 1]
        groups[centre] += nearest
        free = [expert for expert in free if expert not in nearest]
    return groups


def merged(experts: nn.Module, members: list[int], saliency: Tensor, neurons: Tensor) -> list[Tensor]:
    """Gate, up and down of the weighted mean of some experts, neurons in the first's order."""
    shares = (saliency[members] / saliency[members].sum()).double().tolist()
    first = [matrix.double() for matrix in expert_matrices(experts, members[0])]
    total = [shares[0] * matrix for matrix in first]
    for share, expert in zip(shares[1:], members[1:], strict=True):
        gate, up, down = (matrix.double() for matrix in expert_matrices(experts, expert))
        order = matched(first, [gate, up, down], neurons[members[0]], neurons[expert])
        for part, matrix in zip(total, (gate[order], up[order], down[:, order]), strict=True):
            part += share * matrix
    return total


def matched(first: list[Tensor], other: list[Tensor], acts: Tensor, others: Tensor) -> Tensor:
    """Which neuron of the other expert belongs to each of the first: what they give and weigh differs least in all.

    Both are compared at unit length; `acts` and `others` are `[tokens, inner]`.
    """
    vectors = [normalize(torch.cat([gate, up, down.T], 1).float(), dim=-1) for gate, up, down in (first, other)]
    cost = torch.cdist(vectors[0], vectors[1]).cpu()
    cost += torch.cdist(normalize(acts.T, dim=-1), normalize(others.T, dim=-1))
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(columns)
