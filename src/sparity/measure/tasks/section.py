"""Tasks in a recipe: which are asked, and what a model may lose on them."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from sparity.errors import InvalidInput
from sparity.measure.tasks.names import checked_tasks
from sparity.measure.tasks.running import Settings
from sparity.sections import Section, Whole

_LIMIT = re.compile(r"drop < (?P<points>\d+(\.\d+)?) pt( at (?P<percent>\d+(\.\d+)?) ?%)?")


def limit_of(words: str) -> tuple[float, float]:
    """The drop, as a share, and the confidence of "drop < 1 pt at 95 %"; 95 % where none is said.

    Raises:
        ValueError: other words.
    """
    found = _LIMIT.fullmatch(" ".join(words.split()))
    if found is None:
        raise ValueError('write it as "drop < 1 pt at 95 %"')
    drop, percent = float(found["points"]) / 100, float(found["percent"] or 95)
    if not 0 < drop <= 1 or not 50 < percent < 100:
        raise ValueError("a drop lies between 0 and 100 points, a confidence between 50 % and 100 %")
    return drop, percent / 100


def _checked(words: str) -> str:
    limit_of(words)
    return words


def _known(names: list[str]) -> list[str]:
    try:
        return list(checked_tasks(names))
    except InvalidInput as error:
        raise ValueError(str(error)) from error


TaskLimit = Annotated[str, AfterValidator(_checked)]


class Tasks(Section):
    """Tasks that both models are asked, item by item; a list of names is enough."""

    names: Annotated[list[str], AfterValidator(_known)] = Field(description="local tasks, or hub:NAME")
    data: str | None = Field(None, description="the folder of local task files; else the variable SPARITY_DATA")
    fewshot: Whole | None = Field(None, ge=0, description="examples before each question; else what a task says, or 0")
    limit: Whole | None = Field(None, ge=1, description="only the first so many items of each")
    batch: Whole = Field(1, ge=1, description="questions per pass")
    context: Whole = Field(512, ge=32, description="tokens of the long texts that are made")
    items: Whole = Field(100, ge=1, description="how many long texts of each kind")
    seed: Whole = Field(0, description="of the long texts")

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, given: Any) -> Any:
        return {"names": given} if isinstance(given, list) else given

    @property
    def settings(self) -> Settings:
        """How they are asked."""
        return Settings(**self.model_dump(exclude={"names"}))
