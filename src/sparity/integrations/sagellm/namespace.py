"""The specification's own module names, `sage.llm.sagellm.accel.sparsity` and `.quantization`, where nobody owns them.

A finder at the end of `sys.meta_path`: it is asked only after every other one has found nothing, so what is installed
under these names is never hidden, whole or in part.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOME = "sparity.integrations.sagellm"
ALIASES = {
    "sage.llm.sagellm.accel.sparsity": HOME,
    "sage.llm.sagellm.accel.quantization": f"{HOME}.quantization",
}


class _Alias(Loader):
    """Puts another module in the place of the one that is imported."""

    def __init__(self, module: str) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None: the usual empty one, which `exec_module` replaces."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Let the name stand for the module itself, not for a copy of it."""
        sys.modules[module.__name__] = import_module(self.module)


class AliasFinder(MetaPathFinder):
    """Finds the aliases, and empty packages on the way to them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname in ALIASES:
            return ModuleSpec(fullname, _Alias(ALIASES[fullname]), origin=ALIASES[fullname])
        if not any(alias.startswith(f"{fullname}.") for alias in ALIASES):
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = []
        return spec


def provide() -> None:
    """Make the names importable, once."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(AliasFinder())
