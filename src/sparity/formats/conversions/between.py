"""From one format to another, without a change to any value."""

from collections.abc import Mapping
from typing import Any

from sparity.formats.base import build_format, format_of
from sparity.formats.storage.packed import Packed


def convert(packed: Packed, to: str | Mapping[str, Any]) -> Packed:
    """The same weight in another format; quantised values and their scales are taken over as they are.

    Raises:
        CorruptFile: the packed matrix contradicts itself.
        InvalidInput: no such format, or one that cannot hold this mask.
    """
    source = format_of(packed)
    source.check(packed)
    return build_format(to).wrap(source.stored(packed), packed.sides, packed.dtype, packed.encoding)
