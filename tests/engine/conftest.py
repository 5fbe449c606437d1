"""Tiny models on the engine."""

from quick_models import steps, tiny

__all__ = ["steps", "tiny"]
