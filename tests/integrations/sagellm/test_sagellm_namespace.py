"""The specification's module names: ours where nobody has them, never in the place of what is installed."""

import subprocess
import sys
from importlib import import_module
from importlib.machinery import PathFinder

import pytest

from sparity.integrations import sagellm
from sparity.integrations.sagellm import namespace, quantization

SPARSITY = "sage.llm.sagellm.accel.sparsity"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that puts files of a package `sage` where Python finds them; afterwards no trace is left."""

    def forget():
        for name in [name for name in sys.modules if name == "sage" or name.startswith("sage.")]:
            del sys.modules[name]

    def install(**files):
        for dotted, content in files.items():
            path = tmp_path / f"{dotted.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    forget()


def test_where_nobody_has_them_the_names_are_ours(installed):
    assert import_module(SPARSITY) is sagellm
    assert import_module("sage.llm.sagellm.accel.quantization") is quantization
    assert import_module("sage.llm.sagellm.accel").sparsity is sagellm
    assert sagellm.__name__ == "sparity.integrations.sagellm"
    assert sagellm.__spec__.name == "sparity.integrations.sagellm"
    for absent in ("sage.all", "sage.llm.sagellm.accel.kernel_fusion"):
        with pytest.raises(ModuleNotFoundError):
            import_module(absent)


@pytest.mark.parametrize("regular", [True, False])
def test_a_whole_installation_is_never_hidden(installed, regular):
    files = {"sage.llm.sagellm.accel.sparsity": "own = True", "sage.llm.sagellm.accel.quantization": "own = True"}
    if regular:
        levels = ("sage", "sage.llm", "sage.llm.sagellm", "sage.llm.sagellm.accel")
        files |= {f"{level}.__init__": f"level = {level!r}" for level in levels}
    installed(**files)
    assert import_module(SPARSITY).own
    assert import_module("sage.llm.sagellm.accel.quantization").own
    assert import_module(SPARSITY) is not sagellm


@pytest.mark.parametrize("regular", [True, False])
def test_to_an_installation_without_them_only_these_names_are_added(installed, regular):
    installed(**{"sage.all": "own = True", **({"sage.__init__": "level = 'sage'"} if regular else {})})
    assert import_module("sage.all").own
    assert getattr(import_module("sage"), "level", None) == ("sage" if regular else None)
    assert import_module(SPARSITY) is sagellm


def test_an_installation_with_a_part_of_them_keeps_it(installed):
    installed(**{"sage.llm.sagellm.accel.quantization": "own = True", "sage.llm.sagellm.accel.__init__": ""})
    assert import_module("sage.llm.sagellm.accel.quantization").own
    assert import_module(SPARSITY) is sagellm


def test_an_error_inside_an_installation_is_its_own(installed):
    installed(**{"sage.__init__": "import not_there_at_all"})
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        import_module(SPARSITY)


def test_the_finder_comes_after_python_s_own_and_is_there_once():
    namespace.provide()
    (finder,) = (finder for finder in sys.meta_path if isinstance(finder, namespace.AliasFinder))
    assert sys.meta_path.index(finder) > sys.meta_path.index(PathFinder)  # other libraries may add theirs behind it


def test_importing_sparity_alone_adds_nothing():
    code = (
        "import sparity, sparity.integrations.sagellm_accelerator, sys\nassert 'torch' not in sys.modules\nimport sage"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert "No module named 'sage'" in found.stderr
