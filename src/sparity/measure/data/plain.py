"""Values as every JSON reader takes them."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """A value that every JSON reader takes: numbers that are not finite become their names as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
