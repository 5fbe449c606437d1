"""YAML of a recipe or a sweep: read with the numbers that people mean, and changed key by key."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from sparity.errors import CorruptFile, InvalidInput
from sparity.files import expand

LARGEST_FILE = 2**20  # bytes of YAML
MOST_VALUES = 10_000  # keys and values of one YAML text
DEEPEST_KEY = 32  # parts of a.b.c


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2 (YAML 1.1 takes `1e-4` for text and `2:4` for 124, in base 60), and no key twice.

    No aliases, by which a small text stands for a large value, and no merge keys, which are not in YAML 1.2 either.
    """

    _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A key or a value, counted."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            said = f"*{event.anchor} is an alias: write the value out, aliases are not read"
            raise yaml.composer.ComposerError(None, None, said, event.start_mark)
        self._values += 1
        if self._values > MOST_VALUES:
            said = f"more than {MOST_VALUES:,} keys and values: put long lists into files of their own"
            raise yaml.composer.ComposerError(None, None, said, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                said = f'the key "{key.value}" stands twice'
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp", "merge")}
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
    """The value of a YAML text; raises `ValueError`, naming the line, when it is not YAML or too large."""
    if len(text) > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE / 2**20:g} MiB: put texts into files of their own")
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(_said(error)) from error


def _said(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


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
        with path.open("rb") as opened:  # not more of it than is taken
            content = parse_yaml(opened.read(LARGEST_FILE + 1).decode())
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
    if path.count(".") >= DEEPEST_KEY:
        raise InvalidInput(f'override "{override}": a key has at most {DEEPEST_KEY} parts')
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
