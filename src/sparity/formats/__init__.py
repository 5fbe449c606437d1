"""Formats: how the weights that are kept are stored, bit for bit."""

from sparity.formats.base import Format, build_format, format_of, unpack
from sparity.formats.encodings import Encoding, EncodingSpec, build_encoding
from sparity.formats.storage.packed import Packed

__all__ = ["Encoding", "EncodingSpec", "Format", "Packed", "build_encoding", "build_format", "format_of", "unpack"]
