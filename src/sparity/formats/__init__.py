"""Formats: how the weights that are kept are stored, bit for bit."""

from sparity.formats.base import Format, build_format, format_of, unpack
from sparity.formats.storage.packed import Packed

__all__ = ["Format", "Packed", "build_format", "format_of", "unpack"]
