"""Recipe sections from command-line options."""

from typing import Any


def calibration_section(
    text: str | None, field: str, samples: int, length: int | None, seed: int, batch: int
) -> dict[str, Any]:
    """The calibration section; Python's own documentation where no text is named, token ids for a .npy file."""
    if text is not None and text.endswith(".npy"):
        return {"tokens": text, "batch": batch}
    section: dict[str, Any] = {"text": text, "field": field, "samples": samples, "seed": seed, "batch": batch}
    if text is None:
        section |= {"text": "python-docs:calibration", "documents": "joined"}
    if length is not None:
        section["length"] = length
    return section
