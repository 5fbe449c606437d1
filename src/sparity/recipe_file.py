"""YAML of a recipe or a sweep: read with the numbers that people mean, and changed key by key."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from sparity.errors import CorruptFile, InvalidInput
from sparity.files import expand


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2 (YAML 1.1 takes `1e-4` for text and `2:4` for 124, in base 60), and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f'the key "{twice}" stands twice', node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{0,99})\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises `ValueError`, naming the line, when it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_recipe_file(file: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML file holds, its keys not checked yet; `what` is what the messages call it.

    Raises:
        InvalidInput: no such file, or no mapping in it.
        CorruptFile: it is not YAML.
    """
    kinds = "a YAML file, a mapping or a Recipe" if what == "recipe" else "a YAML file or a mapping"
    if not isinstance(file, str | Path):
        raise InvalidInput(f"a {what} is {kinds}, not {type(file).__name__}")
    path = expand(file)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise InvalidInput(f"{what} {path} does not exist")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptFile(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: a {what} is a mapping of keys, got {type(content).__name__}")
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply `a.b=c`; a number selects an item of a list (`stages.0.prune.sparsity=0.6`)."""
    path, value = parse_override(override)
    set_key(content, path, value, f'override "{override}"')


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of `a.b=c`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InvalidInput(f'override "{override}": write it as key.key=value')
    try:
        return path, parse_yaml(text)
    except ValueError as error:
        raise InvalidInput(f'override "{override}": the value is not YAML: {error}') from error


def set_key(content: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set `a.b` in nested mappings and lists, creating mappings that are missing; messages begin with `where`."""
    keys = path.split(".")
    place: Any = content
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(place, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(place):
                raise InvalidInput(f'{where}: "{key}" is not one of the {len(place)} items')
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last and not isinstance(place.get(key), dict | list):
                place[key] = {}
        else:
            raise InvalidInput(f'{where}: nothing lies under "{key}"')
        if last:
            place[index] = value
        else:
            place = place[index]
