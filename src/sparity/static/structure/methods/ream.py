"""REAM: experts are merged into the most salient ones (REAP's saliency; arXiv:2604.04356)."""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sparity.calibration import Visit
from sparity.models.cuts.experts import experts_module
from sparity.models.cuts.whole import blocks_of, cut_model
from sparity.models.dimensions import EXPERTS
from sparity.models.experts import expert_matrices
from sparity.registry import register
from sparity.static.structure.expert_methods import ExpertMethod
from sparity.static.structure.experts import each_routed, expert_output, routed_norms, watched_routes
from sparity.static.structure.methods.base import Choice, Restructured
from sparity.static.structure.subject import Subject
from sparity.static.structure.units import largest, stacked

Groups = dict[int, list[int]]  # the expert that stays -> those that are merged into it, itself first


@register("structure.method", "ream")
@dataclass(frozen=True)
class REAM(ExpertMethod):
    """Keep the experts of the highest saliency, and merge every other one into the most similar of them.

    Saliency is REAP's. Two experts are similar by the cosine of their outputs on all tokens plus that of their router
    logits. The neurons of an expert are matched to those of the one that stays before the weights are averaged by
    saliency. No group is larger than `group`.
    """

    group: int = 16

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See `Method.scores`."""
        return {EXPERTS: stacked([None if each is None else each.mean_gated for each in each_routed(subject)])}

    def choose(self, subject: Subject, sparsity: float) -> Choice:
        """See `Method.choose`."""
        groups = self._groups(subject, sparsity)
        return {EXPERTS: [None if each is None else sorted(each[0]) for each in groups]}

    def restructure(self, subject: Subject, sparsity: float) -> Restructured:
        """See `Method.restructure`."""
        groups = self._groups(subject, sparsity)
        kept = {EXPERTS: [None if each is None else sorted(each[0]) for each in groups]}
        smaller = cut_model(subject.model, kept)
        for block, found in zip(blocks_of(smaller, subject.family), groups, strict=True):
            experts = experts_module(block)
            if found is None or experts is None:
                continue
            members, saliency = found
            with subject.decoder.block(block.index) as dense:
                source = experts_module(dense)
                for place, centre in enumerate(sorted(members)):
                    if source is not None and len(members[centre]) > 1:
                        _merge(experts, place, source, members[centre], saliency)
        return Restructured(smaller, kept)

    def _groups(self, subject: Subject, sparsity: float) -> list[tuple[Groups, Tensor] | None]:
        left = self.sizes(subject.decoder, sparsity)[EXPERTS]
        found: list[tuple[Groups, Tensor] | None] = []
        for visit in subject.visits():
            sums = routed_norms(visit)
            if sums is None:
                found.append(None)
            else:
                saliency = sums.mean_gated
                found.append((self._assigned(saliency, _similarity(visit), left), saliency))
            visit.finish()
        return found

    def _assigned(self, saliency: Tensor, similarity: Tensor, left: int) -> Groups:
        """The most salient experts, and each other one, in order of saliency, with the most similar that has room."""
        centres = largest(saliency, left).tolist()
        groups: Groups = {centre: [centre] for centre in centres}
        others = [e for e in saliency.argsort(descending=True, stable=True).tolist() if e not in groups]
        for expert in others:
            open_ = [centre for centre in centres if len(groups[centre]) < max(self.group, 1 + len(others) // left)]
            best = max(open_ or centres, key=lambda centre: float(similarity[expert, centre]))
            groups[best].append(expert)
        return groups


def _similarity(visit: Visit) -> Tensor:
    """Cosine of outputs, averaged over tokens, plus cosine of router logits over tokens: `[experts, experts]`."""
    experts = experts_module(visit.block)
    assert experts is not None
    count = len(experts.get_parameter("gate_up_proj"))
    outputs, gates, tokens = torch.zeros(count, count), [], 0

    def see(hidden: Tensor, chosen: Tensor, weights: Tensor, logits: Tensor) -> None:
        nonlocal tokens
        found = torch.stack([expert_output(experts, e, hidden) for e in range(count)])  # [experts, tokens, hidden]
        unit = torch.nn.functional.normalize(found, dim=-1)
        outputs.add_(torch.einsum("ath,bth->ab", unit, unit).cpu())
        gates.append(logits.cpu())
        tokens += len(hidden)

    with torch.no_grad(), watched_routes(visit.block, see):
        visit.block.run(visit.inputs, visit.hidden)
    columns = torch.cat(gates).T  # [experts, tokens]
    return outputs / tokens + cosine_similarity(columns[:, None], columns[None], dim=-1)


def _merge(target: nn.Module, place: int, source: nn.Module, members: list[int], saliency: Tensor) -> None:
    """Write the weighted mean of some experts, their neurons matched to the first's, over one expert."""
    shares = saliency[members].double()
    shares = shares / shares.sum() if float(shares.sum()) > 0 else torch.full_like(shares, 1 / len(members))
    first = [matrix.double() for matrix in expert_matrices(source, members[0])]
    total = [float(shares[0]) * matrix for matrix in first]
    for share, expert in zip(shares[1:].tolist(), members[1:], strict=True):
        gate, up, down = (matrix.double() for matrix in expert_matrices(source, expert))
        order = _matched(first, [gate, up, down])
        for part, matrix in zip(total, (gate[order], up[order], down[:, order]), strict=True):
            part += share * matrix
    for written, matrix in zip(expert_matrices(target, place), total, strict=True):
        written.data.copy_(matrix)


def _matched(first: list[Tensor], other: list[Tensor]) -> Tensor:
    """Which neuron of the other expert belongs to each of the first: the assignment of the largest inner product."""
    inner = first[0] @ other[0].T + first[1] @ other[1].T + first[2].T @ other[2]
    _, columns = linear_sum_assignment(-inner.cpu().numpy())
    return torch.as_tensor(columns)
