"""From one format to another, and from and to other libraries."""

from sparity.engine.formats.conversions.between import convert

__all__ = ["convert"]
