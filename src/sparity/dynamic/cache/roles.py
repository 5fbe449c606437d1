"""What is asked of a cache, taken apart: which tokens stay, how they are stored, and which of them a query reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparity.dynamic.cache.functions import policy_of
from sparity.dynamic.cache.policies.base import Policy, Reader
from sparity.dynamic.cache.policies.keep_all import KeepAll
from sparity.dynamic.cache.policies.kivi import Kivi
from sparity.dynamic.cache.policies.minicache import MiniCache
from sparity.dynamic.cache.policies.quest import Quest
from sparity.dynamic.cache.run import Share, check_request
from sparity.errors import InvalidInput

Spec = str | Mapping[str, Any]
Keep = float | Sequence[float | Sequence[float]]  # of all blocks; or of each, or of each of its KV heads


@dataclass(frozen=True)
class Roles:
    """A request.

    Attributes:
        policy: which tokens stay.
        keep: the share of a text's tokens that stay, up to 1, or their number; or of each layer or each of its heads.
        codec: how they are stored; None = as they are.
        reader: which pages of them a query reads; None = everything.
        read_keep: the share of a text's tokens that it reads, up to 1, or their number.
    """

    policy: Policy
    keep: float | tuple[Share, ...]
    codec: Kivi | None = None
    reader: Reader | None = None
    read_keep: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether everything stays and something else is asked for."""
        return isinstance(self.policy, KeepAll) and (self.codec or self.reader) is not None

    @property
    def names(self) -> str:
        """Of what takes part."""
        taking = (None if self.plain else self.policy, self.codec, self.reader)
        return " + ".join(each.name for each in taking if each)

    @property
    def words(self) -> str:
        """What a plan says."""
        found = []
        if isinstance(self.policy, MiniCache):
            found.append(f"{self.policy.name}, layers merged two by two behind the first {_share(self.policy.start)}")
        elif not self.plain:
            shares = flat(self.keep)
            words = _share(shares[0]) if len(shares) == 1 else f"{_share(min(shares))} to {_share(max(shares))}"
            found.append(f"{self.policy.name}, {words} of the cache")
        if self.codec is not None:
            found.append(f"{self.codec.name}, {self.codec.bits} bits beside the last {self.codec.residual} tokens")
        if self.reader is not None:
            found.append(f"{self.reader.name}, {_share(self.read_keep)} of the text read")
        return "; ".join(found)


def roles(
    policy: Spec,
    keep: Keep,
    store: Spec | None = None,
    read: Spec | None = None,
    read_keep: float = 0.25,
    *,
    sinks: int,
    recent: int,
    every: int = 1,
    decode: bool | None = None,
) -> Roles:
    """A request from its options; `kivi`, `minicache`, `quest` and `pqcache` as the policy let everything stay.

    Raises:
        InvalidInput: unknown, given twice, or such that it cannot be met.
    """
    built = policy_of(policy)
    codec, reader = _codec(store), _reader(read)
    shares: Any = tuple(keep) if isinstance(keep, Sequence) else keep
    for share in flat(shares):
        check_request(built, share, sinks, recent, every, decode)
    if isinstance(shares, tuple) and any(isinstance(each, Sequence) for each in shares) and not built.by_head:
        raise InvalidInput(f"heads of {built.name} do not choose each by itself: give `keep` one share for each block")
    if isinstance(built, Kivi):
        if codec is not None:
            raise InvalidInput('the policy "kivi" says how tokens are stored: leave `store` out')
        codec = built
    if isinstance(built, Reader):
        if reader is not None:
            raise InvalidInput(f'the policy "{built.name}" says which tokens are read: leave `read` out')
        if isinstance(shares, tuple):
            raise InvalidInput(f"{built.name} reads one share in all layers: give `keep` as a number")
        reader, read_keep, built, shares = built, shares, KeepAll(), 1.0
    if built.merges and (codec is not None or reader is not None):
        raise InvalidInput(
            f"{built.name} merges what goes into one token, which is stored as it is and always read: leave `store` "
            "and `read` out, or give compensate=False"
        )
    if built.narrows and (codec is not None or reader is not None or isinstance(shares, tuple)):
        raise InvalidInput(
            f"{built.name} says itself what each layer holds, which is stored as it is and read whole: leave `store` "
            "and `read` out, and give `keep` as a number"
        )
    if isinstance(built, MiniCache) and (codec is not None or reader is not None):
        raise InvalidInput(f"{built.name} says how tokens are stored and reads all: leave `store` and `read` out")
    if reader is not None:
        check_request(reader, read_keep, sinks, recent, every, None)
        if codec is not None and not isinstance(reader, Quest):
            raise InvalidInput(f"{reader.name} keeps tokens as they are: leave kivi out, or read by quest")
        if codec is not None and isinstance(reader, Quest) and (reader.page != codec.group or reader.by == "mean"):
            raise InvalidInput(
                f"pages of quantised tokens are their groups, of which the bounds are known: give quest page="
                f"{codec.group} (now {reader.page}) and by=bound, or kivi another group"
            )
        if built.turns:
            raise InvalidInput(f"{built.name} counts positions in the cache, which pages do not: leave `read` out")
    asked = tuple(map(share_of, shares)) if isinstance(shares, tuple) else float(shares)
    return Roles(built, asked, codec, reader, float(read_keep))


def share_of(given: float | Sequence[float]) -> Share:
    """A layer's share, or those of its heads."""
    return tuple(map(float, given)) if isinstance(given, Sequence) else float(given)


def flat(keep: Keep) -> tuple[float, ...]:
    """All shares, one after another."""
    if not isinstance(keep, Sequence):
        return (keep,)
    return tuple(share for each in keep for share in (each if isinstance(each, Sequence) else (each,)))


def shares_of(found: Roles, layers: int, heads: int) -> list[Share]:
    """What each layer keeps.

    Raises:
        InvalidInput: shares of another number of layers, or of heads.
    """
    if not isinstance(found.keep, tuple):
        return [found.keep] * layers
    if len(found.keep) != layers:
        raise InvalidInput(f"keep has {len(found.keep)} shares, and the model {layers} layers: of another model?")
    for index, share in enumerate(found.keep):
        if isinstance(share, tuple) and len(share) != heads:
            raise InvalidInput(
                f"keep has {len(share)} shares of layer {index}, and the model {heads} KV heads: of another model?"
            )
    return list(found.keep)


def _codec(spec: Spec | None) -> Kivi | None:
    built = None if spec is None else policy_of(spec)
    if built is not None and not isinstance(built, Kivi):
        raise InvalidInput(f'store "{built.name}" is none: take kivi, or leave `store` out')
    return built


def _reader(spec: Spec | None) -> Reader | None:
    built = None if spec is None else policy_of(spec)
    if built is not None and not isinstance(built, Reader):
        raise InvalidInput(f'read "{built.name}" does not say what is read: take quest or pqcache, or leave `read` out')
    return built


def _share(keep: float) -> str:
    return f"{100 * keep:g} %" if keep <= 1 else f"{keep:g} tokens"
