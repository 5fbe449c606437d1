"""What every section of a recipe shares: strict keys, frozen values, numbers that are numbers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

Spec = str | dict[str, Any]  # a plug-in: its name, or {name: {option: value}}


def _not_a_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # Python takes True for 1
        raise ValueError("expected a number")
    return value


Whole = Annotated[int, BeforeValidator(_not_a_truth_value)]
Number = Annotated[float, BeforeValidator(_not_a_truth_value)]


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
