"""`sparity explain NAME`: a plug-in's source, rule, options and recipe."""

import dataclasses
import inspect
import sys
import typing
from typing import Annotated, Any

import typer
from rich.text import Text

from sparity.cli import console
from sparity.cli.options import Json

VERB = "verb"


def explain(
    name: Annotated[
        str,
        typer.Argument(
            help="A stage, score, pattern, solver, method, grid, policy, layout, budget, statistic, family, format or "
            "encoding; or a verb.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Explain a plug-in: where it comes from, what it does, its options with defaults, and a recipe to start from."""
    with console.errors_in_one_line():
        found = _verb(name) or [describe(kind, plugin) for kind, plugin in _find(name)]
    if json:
        console.print_json(found)
        return
    for entry in found:
        console.out.print(Text.assemble((entry["name"], "bold"), f" ({entry['kind']})"))
        console.out.print(entry["source"])
        console.out.print()
        console.out.print(entry["text"])
        if entry["options"]:
            console.out.print("\noptions:")
            for option, details in entry["options"].items():
                meaning = f": {details['meaning']}" if details.get("meaning") else ""
                console.out.print(f"  {option}: {details['type']}, default {details['default']}{meaning}")
        for fact, value in entry["facts"].items():
            console.out.print(f"{fact}: {value}")
        console.out.print(f"\n{'on the command line' if entry['kind'] == VERB else 'in a recipe'}:\n{entry['recipe']}")


def _verb(name: str) -> list[dict[str, Any]]:
    """The verb of that name, described as a plug-in is; nothing where there is none, or a plug-in is called so."""
    from sparity import registry
    from sparity.cli.main import VERBS, app

    if name not in VERBS or any(name in registry.names(kind) for kind in registry.PACKAGES):
        return []
    command: Any = typer.main.get_command(app)
    verb = command.commands[name]
    options = {
        max(each.opts, key=len): {"type": "value", "default": each.default, "meaning": each.help}
        for each in verb.params
        if each.param_type_name == "option"
    }
    arguments = " ".join(each.name.upper() for each in verb.params if each.param_type_name == "argument")
    return [
        {
            "kind": VERB,
            "name": name,
            "source": (sys.modules[VERBS[name].__module__].__doc__ or "").strip(),
            "text": inspect.getdoc(VERBS[name]) or "",
            "options": options,
            "facts": {},
            "recipe": f"  sparity {name} {arguments}",
        }
    ]


def first_sentence(plugin: type) -> str:
    """The first sentence of a plug-in's docstring."""
    text = " ".join((inspect.getdoc(plugin) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def describe(kind: str, plugin: Any) -> dict[str, Any]:
    """A plug-in's documentation as data."""
    options, facts = _of_a_stage(plugin) if kind == "stage" else _of_a_dataclass(kind, plugin)
    return {
        "kind": kind,
        "name": plugin.name,
        "source": (sys.modules[plugin.__module__].__doc__ or "").strip(),
        "text": inspect.getdoc(plugin) or "",
        "options": options,
        "facts": facts,
        "recipe": _recipe(kind, plugin.name),
    }


def _of_a_dataclass(kind: str, plugin: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Options and facts."""
    from sparity.registry import type_words

    options = {}
    if dataclasses.is_dataclass(plugin):
        hints = typing.get_type_hints(plugin)
        for field in dataclasses.fields(plugin):
            default = "required" if field.default is dataclasses.MISSING else field.default
            options[field.name] = {"type": type_words(hints[field.name]), "default": default}
    facts = {}
    if getattr(plugin, "needs", None):
        facts["statistics"] = ", ".join(plugin.needs)
    if kind == "activations.method":
        facts |= {"statistics": ", ".join(sorted(plugin().statistics)), "sites": plugin.where}
    if getattr(plugin, "compare_within", None):
        facts["compares within"] = plugin.compare_within
    if getattr(plugin, "own_score", None):
        facts["chooses by"] = plugin.own_score
    return options, facts


def _of_a_stage(stage: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Options, of its pydantic fields, and facts, with default options."""
    from sparity.registry import type_words

    options = {
        name: {
            "type": type_words(field.annotation),
            "default": "required" if field.is_required() else field.get_default(call_default_factory=True),
            "meaning": field.description or "",
        }
        for name, field in stage.model_fields.items()
    }
    if any(field.is_required() for field in stage.model_fields.values()):
        return options, {"preserves": ", ".join(sorted(stage.preserves)) or "nothing"}
    built = stage()
    needs = built.needs()
    statistics = sorted(needs.statistics | needs.gradients | needs.decision)
    facts = {
        "statistics": ", ".join(statistics) or "none",
        "preserves": ", ".join(sorted(built.preserves)) or "nothing",
    }
    return options, facts


def _find(name: str) -> list[tuple[str, type]]:
    from sparity import registry
    from sparity.errors import InvalidInput, suggestion
    from sparity.static.prune.patterns.base import build_pattern

    if ":" in name:
        name = build_pattern(name).name
    found = [(kind, registry.get(kind, name)) for kind in registry.PACKAGES if name in registry.names(kind)]
    if not found:
        everything = [known for kind in registry.PACKAGES for known in registry.names(kind)]
        close = suggestion(name, everything) or ";"
        raise InvalidInput(f'nothing is called "{name}"{close} `sparity methods` lists them all')
    return found


def _recipe(kind: str, name: str) -> str:
    if kind == "stage":
        return f"  stages:\n  - {name}: {{}}"
    if kind == "family":
        return "  model: FOLDER   # a model of this family; nothing else to say"
    if kind == "format":
        return "  # a format says how a weight is stored; no recipe names one yet"
    if kind == "statistic":
        return f'  # a score, solver or budget names it in `needs` and reads statistics["{name}"]; no recipe does'
    if kind == "attention.layout":
        return f"  stages:\n  - attention_blocks: {{layout: {name}}}"
    if kind == "encoding":
        return f"  stages:\n  - prune: {{}}\n  output: {{format: packed, values: {name}}}"
    value = {"n_of_m": '"2:4"', "block": '"block:16x16"'}.get(name, name)
    stage, _, key = kind.rpartition(".")  # a budget is any stage's that shares out a sparsity
    return f"  stages:\n  - {stage or 'prune'}: {{{key}: {value}}}"
