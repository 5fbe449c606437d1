"""An item of a recipe's `stages`, `{name: options}`: read, written and described by the stage of that name."""

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from sparity import registry
from sparity.errors import suggestion
from sparity.stages.base import Stage


class StageItem:
    """One item of `stages`, `{name: options}`: validated by the stage of that name, and written back the same way."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A function for each way."""
        return core_schema.no_info_plain_validator_function(
            _read, serialization=core_schema.plain_serializer_function_ser_schema(_written, info_arg=True)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Exactly one of the stages there are."""
        items = []
        for name in registry.names("stage"):
            options = handler(stage_class(name).__pydantic_core_schema__)
            items.append(
                {"type": "object", "properties": {name: options}, "required": [name], "additionalProperties": False}
            )
        return {"anyOf": items}


def stage_class(name: str) -> type[Stage]:
    """The stage of that name; `InvalidInput` when there is none."""
    found: type[Stage] = registry.get("stage", name)
    return found


def _read(item: Any) -> Stage:
    if isinstance(item, Stage):
        return item
    if not isinstance(item, Mapping) or len(item) != 1:
        found = f"{len(item)} keys" if isinstance(item, Mapping) else repr(item)
        raise PydanticCustomError(
            "stage", "a stage is one key, its name, with its options below it: {found}", {"found": found}
        )
    (name, options), *_ = item.items()
    known = registry.names("stage")
    if name not in known:
        close = suggestion(str(name), known)
        raise PydanticCustomError(
            "stage",
            'no stage "{name}"{close} (stages: {known})',
            {"name": str(name), "close": close, "known": ", ".join(known)},
        )
    try:
        return stage_class(name).model_validate({} if options is None else options)
    except ValidationError as error:  # the same problems, one level down in the recipe
        problems = [_below(name, problem) for problem in error.errors()]
        raise ValidationError.from_exception_data(error.title, problems) from error


def _below(name: str, problem: ErrorDetails) -> InitErrorDetails:
    below: InitErrorDetails = {
        "type": problem["type"],
        "loc": (name, *problem["loc"]),
        "input": problem["input"],
        "ctx": problem.get("ctx", {}),
    }
    return below


def _written(stage: Stage, info: SerializationInfo) -> dict[str, Any]:
    options = stage.model_dump(mode=info.mode, exclude_unset=info.exclude_unset, exclude_defaults=info.exclude_defaults)
    return {stage.name: options}
