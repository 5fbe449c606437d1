"""Cache: tokens whose keys and values a policy finds dispensable are evicted from the cache while the model runs.

Weights stay; what is saved beside them is how much of the text each block's cache keeps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from sparity.calibration.evidence import BlockEvidence
from sparity.checkpoints.runtime_data import AGAIN
from sparity.dynamic.cache.attaching import RECENT, SINKS, attached, check_model, run_of
from sparity.dynamic.cache.converting import layers_of
from sparity.dynamic.cache.learned import KEYS, Learned, Sizes, Study, key_sites, misfit, shape_of
from sparity.dynamic.cache.roles import Roles, flat, roles, share_of, shares_of
from sparity.dynamic.cache.run import Share, rotary_of
from sparity.errors import CorruptFile, InvalidInput
from sparity.models import Block, Decoder, InputSite, Projection
from sparity.registry import register
from sparity.sections import Number, Spec, Whole
from sparity.stages import Change, Decision, Needs, RuntimeStage
from sparity.stages.allocation import projections
from sparity.stages.base import Estimate, ModelEvidence, Property, Workload
from sparity.stages.kinds import RuntimeFit

Positive = Annotated[Number, Field(gt=0)]


@register("stage", "cache")
class CacheStage(RuntimeStage):
    """Tokens that a policy finds dispensable are evicted from the key-value cache."""

    preserves: ClassVar[frozenset[Property]] = frozenset({"mask", "shapes", "values", "prompts", "experts"})

    policy: Spec = Field("snapkv", description="how the tokens that stay are chosen")
    keep: Positive | list[Positive | list[Positive]] = Field(
        0.25,
        description="the share of the text's tokens that stay in each block, up to 1, or their number from 2 on; or a "
        "list of them, one for each block, or a list of one for each of its KV heads",
    )
    store: Spec | None = Field(None, description="how they are stored: kivi, in a few bits; default: as they are")
    read: Spec | None = Field(
        None, description="which of them each new token reads: quest, pages; or pqcache, tokens; default: all"
    )
    read_keep: Annotated[Number, Field(gt=0)] = Field(
        0.25, description="the share of the text's tokens that it reads, up to 1, or their number from 2 on"
    )
    sinks: Annotated[Whole, Field(ge=0)] = Field(
        SINKS, description="tokens at the start of each text that stay whatever the policy says"
    )
    recent: Annotated[Whole, Field(ge=0)] = Field(RECENT, description="tokens at its end that stay, likewise")
    every: Annotated[Whole, Field(ge=1)] = Field(1, description="tokens between two evictions while decoding")
    decode: bool | None = Field(
        None, description="whether tokens are evicted while decoding; default: if the policy was made to"
    )
    exact: bool = Field(
        True, description="whether a layer that holds and reads everything gives the bits of the model's own attention"
    )

    @property
    def asked(self) -> Roles:
        """The request, built anew.

        Raises:
            InvalidInput: unknown, or with options that make no sense or cannot be met.
        """
        return roles(
            self.policy,
            self.keep,
            self.store,
            self.read,
            self.read_keep,
            sinks=self.sinks,
            recent=self.recent,
            every=self.every,
            decode=self.decode,
        )

    @property
    def words(self) -> str:
        """See `Stage.words`."""
        return self.asked.words

    @property
    def how(self) -> str:
        """See `Stage.how`."""
        return self.asked.names

    @property
    def relies_on(self) -> frozenset[Property]:
        """What is calibrated holds for these weights; and one policy alone says what stays."""
        return super().relies_on | {"tokens"}

    def needs(self) -> Needs:
        """Nothing is read, but what a policy learns from text."""
        return Needs(text=self.refines)

    @property
    def refines(self) -> bool:
        """See `RuntimeStage.refines`."""
        return self.asked.policy.reads_text

    def refine(
        self, model: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor], tokens: Tensor
    ) -> Mapping[str, Tensor]:
        """See `RuntimeStage.refine`: with what the policy learns, `KEY.NAME` of every block."""
        study = Study(Decoder.open(model), list(layers_of(model)), tokens)
        names = [_key_projection([site]).name for site in key_sites(sites)]
        found = self.asked.policy.learn(study)
        more = ((f"{key}.{name}", each[name]) for key, each in zip(names, found, strict=True) for name in each)
        return {**data, **{name: tensor.contiguous() for name, tensor in more}}

    def decide(self, model: Decoder, evidence: ModelEvidence | None) -> Decision:
        """What each block's cache keeps: `{"keep": {key projection: share or number}}`, 1 behind a sliding window.

        Where heads differ it is a list of theirs.

        What a policy learns without text also, `{"retrieval": {key projection: [KV head: 0 or 1]}}`.
        """
        found = self.asked
        check_model(model.skeleton)
        rotary_of(model.skeleton, found.policy)
        whole = list(layers_of(model.skeleton))
        found.policy.pairs(whole)
        names = [_key_projection(model.sites(index)).name for index in range(len(model))]
        shares = zip(names, shares_of(found, len(model), Sizes.of(model.config).kv_heads), whole, strict=True)
        decision = {"keep": {name: as_json(keep) if sees else 1.0 for name, keep, sees in shares}}
        if found.policy.reads_text or not found.policy.learns:
            return decision
        learned = dict(zip(names, found.policy.learn(Study(model, whole)), strict=True))
        return decision | {
            kind: {name: (each[kind] * 1).tolist() for name, each in learned.items()}
            for kind in sorted(found.policy.learns)
        }

    def fit(self, model: Decoder, evidence: BlockEvidence, decision: Decision) -> RuntimeFit:
        """`KEY.keep`, float64 `[]` or `[kv_heads]`, and what the policy learns without text; weights stay."""
        name = _key_projection(evidence.block.sites).name
        keep = torch.tensor(decision["keep"][name], dtype=torch.float64)
        changes = (Change.of(self.name, each, evidence.block.index) for each in evidence.block.projections)
        tensors = {f"{name}.keep": keep}
        for kind in decision.keys() - {"keep"}:
            dtype = torch.bool if kind == "retrieval" else torch.float32
            tensors[f"{name}.{kind}"] = torch.tensor(decision[kind][name], dtype=dtype)
        return RuntimeFit(tensors, tuple(changes))

    def attach(self, module: nn.Module, sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> Any:
        """See `RuntimeStage.attach`; a block alone has no cache."""
        if not hasattr(module, "config") or not hasattr(module, "base_model"):
            return nullcontext()
        learns = self.asked.policy.learns
        keep = {name: tensor for name, tensor in data.items() if name.rpartition(".")[2] not in learns}
        return self._attached(module, _keep_of(sites, keep), _learned_of(sites, data, module, learns))

    @contextmanager
    def _attached(self, model: Any, keep: Sequence[Share], learned: Learned) -> Iterator[None]:
        found = run_of(
            model,
            self.asked,
            keep,
            learned,
            sinks=self.sinks,
            recent=self.recent,
            every=self.every,
            decode=self.decode,
            exact=self.exact,
        )
        with attached(model, found):
            yield

    def estimate(self, model: Decoder, decision: Decision, work: Workload) -> Estimate:
        """See `Stage.estimate`."""
        changes = tuple(Change.planned(self.name, projection, index) for index, projection in projections(model))
        sizes = Sizes.of(model.config)
        shapes = [shape_of(name, sizes) for name in self.asked.policy.learns]
        learned = sum(math.prod(shape) * (1 if len(shape) == 1 else 4) for shape in shapes)  # a bool, or float32
        shares = sum(len(flat([share])) for share in shares_of(self.asked, len(model), sizes.kv_heads))
        return Estimate(changes=changes, runtime_bytes=8 * shares + learned * len(model))

    def verify(self, block: Block, decision: Decision) -> list[str]:
        """Blocks whose recorded share is another than was asked for."""
        name = _key_projection(block.sites).name
        found = decision["keep"].get(name)
        keep = self.asked.keep
        known = [as_json(share) for share in (keep if isinstance(keep, tuple) else (keep,))]
        wanted = " or ".join(f"{share}" for share in known)
        return [] if found in [*known, 1.0] else [f"{name}: recorded to keep {found} of its cache, not {wanted}"]


def _key_projection(sites: Sequence[InputSite]) -> Projection:
    """The projection of a block's keys.

    Raises:
        InvalidInput: the block has none.
    """
    for projection in (each for site in sites for each in site.projections):
        if projection.role in KEYS:
            return projection
    raise InvalidInput("cache: a block has no projection of keys")


def _keep_of(sites: Sequence[InputSite], data: Mapping[str, Tensor]) -> list[Share]:
    """What each block keeps, or each of its heads, in their order.

    Raises:
        CorruptFile: the data does not fit the blocks.
    """
    names = [f"{each.name}.keep" for site in sites for each in site.projections if each.role in KEYS]
    if sorted(names) != sorted(data):
        odd = sorted(set(names) ^ set(data))[0]
        raise CorruptFile(f"cache: the file {'lacks' if odd in names else 'holds the unknown'} {odd}; {AGAIN}")
    for name, keep in data.items():
        fits = keep.dtype == torch.float64 and keep.ndim < 2 and keep.numel()
        if not fits or not bool((keep > 0).all()) or not bool(keep.isfinite().all()):
            raise CorruptFile(f"cache: {name} is {keep.dtype} {keep.tolist()}, not a share or a number; {AGAIN}")
    return [share_of(data[name].tolist()) for name in names]


def as_json(share: Share) -> float | list[float]:
    """A share, or a list of those of heads."""
    return list(share) if isinstance(share, tuple) else share


def _learned_of(sites: Sequence[InputSite], data: Mapping[str, Tensor], model: Any, names: Set[str]) -> Learned:
    """What the policy learned of each block, in their order.

    Raises:
        CorruptFile: the data does not fit the blocks.
    """
    sizes, found = Sizes.of(model.config.get_text_config(decoder=True)), []
    for key in (each.name for site in sites for each in site.projections if each.role in KEYS):
        for name in sorted(names):
            if wrong := "missing" if f"{key}.{name}" not in data else misfit(name, data[f"{key}.{name}"], sizes):
                raise CorruptFile(f"cache: {key}.{name} is {wrong}: of another model, or damaged; {AGAIN}")
        found.append({name: data[f"{key}.{name}"] for name in names})
    return found
