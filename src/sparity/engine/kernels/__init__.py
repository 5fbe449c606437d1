"""Kernels: one folder per operation, each with the reference that specifies it and the back ends that do it."""

from sparity.engine.kernels.prepared import Prepared, prepare

__all__ = ["Prepared", "prepare"]
