"""From one format to another, and from and to other libraries."""

from sparity.formats.conversions.between import convert

__all__ = ["convert"]
