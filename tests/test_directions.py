"""Imports go in one direction: a level may import the levels before it, never a sibling or a later one."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sparity"
LEVELS = (
    ("visible",),
    ("errors",),
    ("files", "memory", "processes", "products", "registry", "sections"),
    ("formats", "zoo"),
    ("checkpoints",),
    ("models",),
    ("calibration", "quality", "engine.kernels"),
    ("budgets", "engine"),
    ("stages",),
    ("training.fine_tune",),
    ("static", "training", "dynamic"),
    ("healing",),
    ("measure",),
    ("recipe_file",),
    ("recipe_problems",),
    ("recipe",),
    ("sweep_file",),
    ("pipeline",),
    ("integrations", "serve"),
    ("cli",),
    ("__main__",),
)
FREE = {"__init__"}  # the package's own front door loads everything on demand
KINDS = ("static.prune.scores", "static.prune.patterns", "static.prune.solvers")


def part(module):
    """The level and the part of a module such as `sparity.static.prune.scores.wanda`."""
    name = module.removeprefix("sparity").lstrip(".")
    best = max(
        ((level, unit) for level, units in enumerate(LEVELS) for unit in units if f"{name}.".startswith(f"{unit}.")),
        key=lambda found: len(found[1]),
        default=None,
    )
    return best


def imports(path):
    """The modules of sparity that a file imports anywhere, `from sparity import x` counted as sparity.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparity":
            names = [f"sparity.{alias.name}" for alias in node.names] if node.module == "sparity" else [node.module]
            yield from (name for name in names if name != "sparity.__version__")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "sparity")


def breaches(module, imported):
    """What is wrong with one import, or None."""
    here, there = part(module), part(imported)
    if there is None:
        return (
            None if imported == "sparity" and here == part("sparity.cli") else f"{module} imports {imported}: no level"
        )
    if here != there and there[0] >= here[0]:
        return f"{module} imports {imported}"
    kinds = [next((kind for kind in KINDS if f"sparity.{kind}." in f"{name}."), None) for name in (module, imported)]
    if all(kinds) and kinds[0] != kinds[1]:
        return f"{module} imports {imported}: scores, patterns and solvers never import one another"
    return None


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(("sparity", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        if name != "sparity":
            yield name, path


def test_every_module_has_a_level():
    assert [name for name, _ in modules() if part(name) is None] == []


def test_no_import_goes_up_or_sideways():
    found = [breaches(name, imported) for name, path in modules() for imported in imports(path)]
    assert [breach for breach in found if breach] == []


@pytest.mark.parametrize(
    ("module", "imported", "breach"),
    [
        ("sparity.models.decoder", "sparity.calibration.walk", True),
        ("sparity.quality.perplexity", "sparity.calibration.text", True),
        ("sparity.static.prune.scores.wanda", "sparity.static.prune.patterns.base", True),
        ("sparity.static.prune.pruning", "sparity.static.prune.patterns.base", False),
        ("sparity.static.prune.scores.wanda", "sparity.calibration", False),
    ],
)
def test_the_rule_itself(module, imported, breach):
    assert (breaches(module, imported) is not None) == breach
