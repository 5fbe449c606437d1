"""No file outside a stage's own folder asks which stage it is; the command line and adapters may write recipes."""

import ast
from pathlib import Path

from sparity import registry

SOURCE = Path(__file__).parents[1] / "src" / "sparity"
STAGES = registry.names("stage")
MODULES = {registry.get("stage", name).__module__: registry.get("stage", name).__name__ for name in STAGES}
CLASSES = set(MODULES.values())
OWN = {SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py") for module in MODULES}


def asks(path):
    """What in a file's code depends on one particular stage."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(f"{path.name} imports {node.module}")
        if isinstance(node, ast.Compare):
            named = {part.value for part in (node.left, *node.comparators) if isinstance(part, ast.Constant)}
            if named & set(STAGES):
                found.append(f"{path.name}:{node.lineno} compares with a stage's name")
        if isinstance(node, ast.Name) and node.id in CLASSES:
            found.append(f"{path.name}:{node.lineno} names a stage's class")
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in STAGES:
            found.append(f"{path.name}:{node.lineno} looks a stage up by name")
        if isinstance(node, ast.Dict) and not {"cli", "integrations"} & set(path.parts):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if keys & set(STAGES):
                found.append(f"{path.name}:{node.lineno} has a stage's name as a key")
    return found


def test_no_file_asks_which_stage_it_is():
    beside = {path.parent for path in OWN if path.name == "stage.py"}  # what lies in a stage's folder is its own
    own = OWN | {SOURCE / "__init__.py"}  # which lists what is public, and a function may be called as a stage is
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path not in own and path.parent not in beside]
    assert len(files) > 150
    assert [breach for path in files for breach in asks(path)] == []


def test_the_rule_itself(tmp_path):
    for line in (
        "from sparity.static.prune.stage import Prune",
        "stage.name == 'prune'",
        "isinstance(stage, Prune)",
        "table['prune']",
        "{'prune': 1}",
    ):
        (tmp_path / "x.py").write_text(line)
        assert asks(tmp_path / "x.py"), line
    (tmp_path / "x.py").write_text("stage.name == other.name")
    assert not asks(tmp_path / "x.py")
