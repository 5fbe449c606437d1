"""Whether the items of a task can show what a recipe accepts, known before anything is run."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sparity.measure.tasks.names import FILES, HUB, MADE
from sparity.measure.tasks.running import Settings
from sparity.measure.tasks.section import limit_of
from sparity.quality.paired import items_needed

VARIABLE = "SPARITY_DATA"  # names the folder of task files where `data` does not
DISCORDANT = (0.05, 0.1, 0.2)  # shares of items on which two models may differ: known only afterwards


@dataclass(frozen=True)
class Needed:
    """What a limit on a task asks of its sample.

    Attributes:
        name: of the task.
        limit: as the recipe has it.
        items: that there are; None where that is not known yet.
        needed: of each share of differing items, how many an unharmed model needs to pass four times in five.
    """

    name: str
    limit: str
    items: int | None
    needed: dict[float, int]

    @property
    def hopeless(self) -> bool:
        """Whether even two models that differ on few items could seldom pass."""
        return self.items is not None and self.items < min(self.needed.values())


def needed_items(name: str, limit: str, settings: Settings) -> Needed:
    """How many items a limit needs, beside those that there are."""
    drop, confidence = limit_of(limit)
    return Needed(
        name,
        limit,
        counted(name, settings),
        {share: items_needed(drop, share, confidence=confidence) for share in DISCORDANT},
    )


def counted(name: str, settings: Settings) -> int | None:
    """The items of a task with these settings, or None where its file is not there or is the hub's."""
    if name.startswith(HUB):
        return None
    if name.startswith(MADE):
        return min(settings.items, settings.limit or settings.items)
    folder = settings.data or os.environ.get(VARIABLE)
    named = re.search(r"\bfile: ([^\s},]+)", (FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    if not folder or named is None or not (path := Path(folder) / named[1]).is_file():
        return None
    text = path.read_text(encoding="utf-8")
    every = len(json.loads(text)["samples"]) if path.suffix == ".json" else sum(map(bool, text.splitlines()))
    return min(every, settings.limit or every)
