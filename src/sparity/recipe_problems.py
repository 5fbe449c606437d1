"""What is wrong with a recipe, in the words of its keys."""

import re
import sys
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ValidationError

from sparity import registry
from sparity.errors import suggestion
from sparity.stages.item import stage_class

MOST_PROBLEMS = 10  # of a recipe that one message names
_BRANCH = re.compile(r"str|(list\[|dict\[|function-).*")  # in a problem's place: no key, an alternative of a union


def explain(error: ValidationError, where: str, recipe: type[BaseModel]) -> str:
    """One line for all that a check of `recipe` found; `where` is what the message calls the recipe."""
    problems: list[str] = []
    for problem in error.errors():
        if len(problems) == MOST_PROBLEMS:
            problems.append("and more")
            break
        if problem["loc"] and problem["loc"][-1] == "str" and isinstance(problem["input"], dict):
            continue  # a mapping was meant: what is wrong with it is another problem of the list
        place = ".".join(str(part) for part in problem["loc"] if not _BRANCH.fullmatch(str(part)))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            keys = _keys_at(problem["loc"][:-1], recipe)
            message = f"unknown key{suggestion(str(problem['loc'][-1]), keys)} (keys here: {', '.join(keys)})"
        elif "input" in problem and not isinstance(problem["input"], dict):
            message += f", got {problem['input']!r}"
        problems.append(f"{place}: {message}" if place else message)
    return f"{where}: " + "; ".join(problems)


def _keys_at(place: tuple[Any, ...], recipe: type[BaseModel]) -> list[str]:
    """The keys that a section allows, found by following the place through the models."""
    model: Any = recipe
    for before, key in pairwise((None, *place)):
        if isinstance(before, int) and key in registry.names("stage"):
            model = stage_class(key)
        elif isinstance(key, str) and key in model.model_fields:
            known = vars(sys.modules[model.__module__])
            nested = re.findall(r"\b[A-Z]\w+", str(model.model_fields[key].annotation))
            model = next((known[name] for name in nested if isinstance(known.get(name), type)), model)
    return list(model.model_fields)
