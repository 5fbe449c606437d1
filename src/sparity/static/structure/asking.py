"""The stage as a recipe has it, for code that writes recipes."""

from collections.abc import Mapping
from typing import Any


def removing(method: str, options: Mapping[str, Any], share: float) -> dict[str, Any]:
    """An entry of `stages` that removes a share, as a method with these options chooses."""
    return {"structure": {"method": {method: dict(options)}, "sparsity": share}}
