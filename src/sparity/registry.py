"""One registry for every kind of plug-in: a plug-in's name is the name of its file.

`get("prune.score", "wanda")` imports `sparity.static.prune.scores.wanda` on demand. A kind that belongs to one stage is
named `STAGE.KIND`; names of different kinds may be equal. Other packages add plug-ins through the entry-point group
`sparity.plugins`, with entries named `kind.name`, such as `prune.score.mine`.
"""

import dataclasses
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar

from sparity.errors import InvalidInput, suggestion

PACKAGES: dict[str, tuple[str, ...]] = {  # where the plug-ins of a kind lie
    "stage": ("sparity.static", "sparity.training", "sparity.dynamic", "sparity.healing"),
    "prune.score": ("sparity.static.prune.scores",),
    "prune.pattern": ("sparity.static.prune.patterns",),
    "prune.solver": ("sparity.static.prune.solvers",),
    "quantize.method": ("sparity.static.quantize.methods",),
    "quantize.grid": ("sparity.static.quantize.grids",),
    "structure.method": ("sparity.static.structure.methods",),
    "sparse_training.method": ("sparity.training.sparse_training.methods",),
    "heal.method": ("sparity.healing.heal.methods",),
    "activations.method": ("sparity.dynamic.activations.methods",),
    "activations.heal": ("sparity.dynamic.activations.heals",),
    "cache.policy": ("sparity.dynamic.cache.policies",),
    "attention.layout": ("sparity.dynamic.attention.layouts",),
    "budget": ("sparity.budgets",),
    "statistic": ("sparity.calibration.input_statistics",),
    "format": ("sparity.formats",),
    "encoding": ("sparity.formats.encodings",),
    "family": ("sparity.models.families",),
}

Plugin = TypeVar("Plugin", bound=type)
_registered: dict[tuple[str, str], type] = {}


def register(kind: str, name: str) -> Callable[[Plugin], Plugin]:
    """Class decorator: make a class available as the plug-in `name` of `kind`.

    Example:
        >>> import sparity, torch
        >>> from dataclasses import dataclass
        >>> from sparity.static.prune.scores.base import Score
        >>> @sparity.register("prune.score", "largest_goes")
        ... @dataclass(frozen=True)
        ... class LargestGoes(Score):
        ...     def score(self, weight, statistics):
        ...         return -weight.abs().float()
        >>> sparity.prune_weight(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), score="largest_goes", pattern="2:4")[0]
        tensor([[0., 1., 2., 0.]])
    """
    _known_kind(kind)

    def decorate(plugin: Plugin) -> Plugin:
        plugin.name = name  # type: ignore[attr-defined]
        _registered[kind, name] = plugin
        return plugin

    return decorate


def names(kind: str) -> list[str]:
    """All plug-ins of a kind, sorted: Sparity's own, those of installed packages, and those registered by hand."""
    own = set(_modules(_known_kind(kind)))
    by_hand = {name for plugin_kind, name in _registered if plugin_kind == kind}
    return sorted(own | by_hand | {name for plugin_kind, name in _entry_points() if plugin_kind == kind})


def get(kind: str, name: str) -> type:
    """The class of a plug-in, imported on demand.

    Raises:
        InvalidInput: no such kind or name; the message suggests the nearest one.
    """
    _known_kind(kind)
    if (kind, name) not in _registered:
        if name not in names(kind):
            raise InvalidInput(
                f'no {word(kind)} "{name}"{suggestion(name, names(kind)) or ";"} '
                f"`sparity methods {word(kind)}` lists them all"
            )
        if (kind, name) in _entry_points():
            _registered[kind, name] = _entry_points()[kind, name].load()
        else:
            import_module(_modules(kind)[name])
    return _registered[kind, name]


def build(kind: str, spec: str | Mapping[str, Any]) -> Any:
    """A plug-in object from a recipe's value: `ria`, or `{ria: {a: 0.3}}`.

    Raises:
        InvalidInput: unknown name or option, or a value of the wrong type.
    """
    if isinstance(spec, str):
        return create(kind, spec, {})
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, options), *_ = spec.items()
        if options is None or isinstance(options, Mapping):
            return create(kind, str(name), dict(options or {}))
    raise InvalidInput(f"{word(kind)}: give a name or {{name: {{option: value}}}}, not {spec!r}")


def create(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """The plug-in `name` with the given options, each checked against the dataclass field it sets."""
    plugin = get(kind, name)
    fields = option_types(plugin)
    for key in options:
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise InvalidInput(
                f'{word(kind)} "{name}" has no option "{key}"{suggestion(key, fields)} (options: {known})'
            )
    missing = [key for key in _required(plugin) if key not in options]
    if missing:
        raise InvalidInput(f'{word(kind)} "{name}" needs the option {" and ".join(missing)}: `sparity explain {name}`')
    values = {
        key: _typed(value, fields[key], f'{word(kind)} "{name}", option "{key}"') for key, value in options.items()
    }
    return plugin(**values)


def option_types(plugin: type) -> dict[str, Any]:
    """Name and type of each option that a plug-in takes."""
    hints = typing.get_type_hints(plugin)
    return {field.name: hints[field.name] for field in dataclasses.fields(plugin) if field.init}


def _required(plugin: type) -> list[str]:
    absent = dataclasses.MISSING
    options = [field for field in dataclasses.fields(plugin) if field.init]
    return [field.name for field in options if field.default is absent and field.default_factory is absent]


def _typed(value: Any, expected: Any, where: str) -> Any:
    choices = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for choice in choices:
        if _fits(value, choice):
            return float(value) if choice is float else value
    raise InvalidInput(f"{where}: expected {' or '.join(map(type_words, choices))}, got {value!r}")


def _fits(value: Any, expected: Any) -> bool:
    if typing.get_origin(expected) is typing.Literal:
        return value in typing.get_args(expected)
    if typing.get_origin(expected) is tuple:  # of any length, a list in a recipe
        return isinstance(value, list | tuple) and all(_fits(each, typing.get_args(expected)[0]) for each in value)
    if expected in (int, float):  # True is no number here, though Python says so
        return isinstance(value, int if expected is int else int | float) and not isinstance(value, bool)
    return isinstance(value, expected)


def type_words(expected: Any) -> str:
    """An option's type in words: `int`, or the values that it may have."""
    kind = typing.get_origin(expected)
    if kind is typing.Annotated:
        return type_words(typing.get_args(expected)[0])
    if kind is typing.Literal:
        return " or ".join(map(repr, typing.get_args(expected)))
    if kind is tuple:
        return f"list of {type_words(typing.get_args(expected)[0])}"
    if kind in (types.UnionType, typing.Union):
        return " or ".join(map(type_words, typing.get_args(expected)))
    if expected is types.NoneType:
        return "none"
    return str(getattr(expected, "__name__", expected))


def word(kind: str) -> str:
    """What messages call a kind: `score` for `prune.score`."""
    return kind.rpartition(".")[2]


@cache
def _modules(kind: str) -> dict[str, str]:
    """The plug-ins that Sparity brings: name -> module. One that needs a folder of its own is `NAME/stage.py` in it."""
    found: dict[str, str] = {}
    for package in PACKAGES[kind]:
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            name = module.name.rpartition(".")[2]
            if not module.ispkg and name != "base":
                found[name] = module.name
            elif module.ispkg and kind == "stage" and find_spec(f"{module.name}.stage"):
                found[name] = f"{module.name}.stage"
    return found


def kind_called(name: str) -> str:
    """The kind that a user means by `prune.score`, `score` or `scores`.

    Raises:
        InvalidInput: there is none, or there are several; the message names them.
    """
    called = {form: kind for kind in PACKAGES for form in (kind, f"{kind}s", f"{kind.removesuffix('y')}ies")}
    if name in called:
        return called[name]
    found = [kind for form, kind in called.items() if word(form) == name]
    if len(found) > 1:
        raise InvalidInput(f'"{name}" may be {" or ".join(found)}: give the whole name')
    return found[0] if found else _known_kind(name)


def _known_kind(kind: str) -> str:
    if kind not in PACKAGES:
        close = suggestion(kind, PACKAGES) or suggestion(kind, map(word, PACKAGES))
        raise InvalidInput(f'no plug-in kind "{kind}"{close} (kinds: {", ".join(PACKAGES)})')
    return kind


@cache
def _entry_points() -> dict[tuple[str, str], EntryPoint]:
    found: dict[tuple[str, str], EntryPoint] = {}
    for entry in entry_points(group="sparity.plugins"):
        kind, _, name = entry.name.rpartition(".")
        found[kind, name] = entry
    return found
