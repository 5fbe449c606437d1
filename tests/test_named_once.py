"""Formats and encodings are named in the registry and where a kernel declares what it takes; nobody else lists them."""

import ast
import re
from pathlib import Path

import pytest

from sparity import registry
from sparity.engine.kernels import native_weight, triton_weight, vendor_weight
from sparity.engine.kernels.prefill import cpu as prefill
from sparity.formats import build_encoding

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sparity"
FORMATS, ENCODINGS = registry.names("format"), registry.names("encoding")
QUANTISING = {name for name in ENCODINGS if not build_encoding(name).exact}
HOME = "formats/encodings/"
DECLARED = {"TAKES": "the pairs that a back end takes", "UNPACKS": "the pairs that are unpacked panel by panel"}
LISTS = {  # where several formats stand together, and why
    ("engine/kernels/native_weight.py", "CODES"): "the numbers of the enum in csrc/sparity_kernels.h",
    ("formats/conversions/scipy.py", "to_scipy"): "the formats that SciPy has too",
    ("integrations/sagellm/protocol.py", "SparsityFormat"): "the names of sageLLM's specification",
    ("integrations/sagellm/meaning.py", "_HELD_AS"): "which of those hold a pattern of the specification",
    ("formats/conversions/scipy.py", "from_scipy"): "SciPy's own names",
}

SPECIFIED = {  # names of types in another's interface
    ("integrations/sagellm/quantization.py", "QuantConfig"): "a default of sageLLM's specification",
    ("integrations/sagellm/quantization.py", "joint_sparse_quant"): "its example",
}


def parts():
    """Every file and the parts of it: its functions, classes and assignments, by name."""
    for path in sorted(SOURCE.rglob("*.py")):
        for part in ast.parse(path.read_text()).body:
            target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
            name = getattr(part, "name", None) or getattr(target, "id", "")
            yield str(path.relative_to(SOURCE)), name, part


def texts(nodes):
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def collections(part):
    """The texts of each tuple, list, set or mapping that is written out."""
    for node in ast.walk(part):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            yield texts(node.elts)
        elif isinstance(node, ast.Dict):
            yield texts(key for key in node.keys if key is not None)


def test_formats_and_encodings_are_listed_nowhere_else():
    found = {
        (path, name)
        for path, name, part in parts()
        for listed in collections(part)
        if len(listed & set(FORMATS)) > 1 or len(listed & set(ENCODINGS)) > 1
    }
    assert {place for place in found if place[1] not in DECLARED} == set(LISTS)


def test_only_an_encodings_own_file_and_the_kernels_declarations_name_one_that_quantises():
    named = {
        (path, name)
        for path, name, part in parts()
        if texts(ast.walk(part)) & QUANTISING and not path.startswith(HOME) and name not in DECLARED
    }
    assert named == set(SPECIFIED)


def test_no_case_is_made_of_an_encoding():
    compared = [
        (path, ast.unparse(node))
        for path, _, part in parts()
        for node in ast.walk(part)
        if isinstance(node, ast.Compare) and texts(ast.walk(node)) & set(ENCODINGS)
    ]
    assert compared == []


@pytest.mark.parametrize("takes", [native_weight.TAKES, prefill.UNPACKS, triton_weight.TAKES, vendor_weight.TAKES])
def test_kernels_take_what_is_registered(takes):
    assert takes
    assert {name for name, _ in takes} <= set(FORMATS)
    assert {name for _, name in takes} <= set(ENCODINGS)


def test_the_codes_are_those_of_the_header():
    header = (ROOT / "csrc/sparity_kernels.h").read_text()
    assert native_weight.CODES.keys() == {name for name, _ in native_weight.TAKES}
    for name, code in native_weight.CODES.items():
        assert re.search(rf"\bSPARITY_{name.upper()} = {code}\b", header), name
