"""Encodings: how the value of a weight is stored, whatever format holds it."""

from sparity.formats.encodings.base import Encoding, EncodingSpec, build_encoding

__all__ = ["Encoding", "EncodingSpec", "build_encoding"]
