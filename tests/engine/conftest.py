"""Tiny models on the engine."""

from quick_models import calls, steps, tiny

__all__ = ["calls", "steps", "tiny"]
