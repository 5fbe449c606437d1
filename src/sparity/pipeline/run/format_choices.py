"""What was chosen for speed when a checkpoint was packed, and why: `sparity-choices.json` beside its weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparity.engine.kernels import choice_file
from sparity.engine.kernels.choice import Choice
from sparity.engine.kernels.fastest import Fastest
from sparity.files import read_json_object, write_json

CHOICES = "sparity-choices.json"
FORMAT = 1


def write_choices(folder: Path, chosen: Mapping[str, Fastest]) -> None:
    """Write the choice of each stored tensor, equal cases together."""
    cases: dict[str, dict[str, Any]] = {}
    for name, found in chosen.items():
        entry = {**found.case._asdict(), **described(found.choice)}
        cases.setdefault(found.case.key, {**entry, "weights": []})["weights"].append(name)
    content = {"format": FORMAT, "machine": choice_file.machine(), "cases": list(cases.values())}
    write_json(folder / CHOICES, content)


def described(choice: Choice) -> dict[str, Any]:
    """A choice as JSON: winner, how it was found, and per candidate the seconds per call and why it lost."""
    return {
        "winner": choice.winner,
        "how": choice.how,
        "candidates": [asdict(candidate) for candidate in choice.candidates],
    }


def dense_words(folder: Path) -> str:
    """How many matrices of a folder that was packed for speed are dense, and why; empty for another folder."""
    if not (folder / CHOICES).is_file():
        return ""
    cases = read_json_object(folder / CHOICES)["cases"]
    total = sum(len(case["weights"]) for case in cases)
    reasons = Counter[str]()
    for case in cases:
        if case["winner"] == "dense":
            reasons[_reason(case)] += len(case["weights"])
    if not reasons:
        return f"chosen for speed, none of {total} matrices is faster dense"
    dense, why = sum(reasons.values()), ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
    return f"chosen for speed, {dense} of {total} matrices stored dense: {why}"


def _reason(case: Mapping[str, Any]) -> str:
    timed = [candidate for candidate in case["candidates"] if candidate["seconds"] is not None]
    if timed:
        return "faster where they were packed"
    lost = next(candidate["lost"] for candidate in case["candidates"] if candidate["name"] == "bitmask")
    return str(lost if case["how"] == "the only candidate" else case["how"])
