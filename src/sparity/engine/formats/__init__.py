"""Formats: how the weights that are kept are stored, bit for bit."""

from sparity.engine.formats.base import Format, build_format, format_of, unpack
from sparity.engine.formats.storage.packed import Packed

__all__ = ["Format", "Packed", "build_format", "format_of", "unpack"]
