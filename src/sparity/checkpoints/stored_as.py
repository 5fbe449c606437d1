"""How packed matrices are stored, where a recipe says so of some of them."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Field

from sparity import registry
from sparity.errors import InvalidInput, suggestion
from sparity.sections import Section, Spec


def known_encoding(spec: Spec) -> Spec:
    """The spec, if there is such an encoding."""
    registry.build("encoding", spec)
    return spec


def _known_format(spec: Spec) -> Spec:
    registry.build("format", spec)
    return spec


class StoredAs(Section):
    """How some packed matrices are stored; what is left out is as for all."""

    format: Annotated[Spec, AfterValidator(_known_format)] | None = Field(None, description="a format")
    values: Annotated[Spec, AfterValidator(known_encoding)] | None = Field(None, description="an encoding")


def stored_as(name: str, matrices: Mapping[str, StoredAs]) -> StoredAs:
    """What is said of the matrix `name`, its tensor's name without `.weight`; of several globs the last one counts."""
    return next((said for glob, said in reversed(list(matrices.items())) if fnmatchcase(name, glob)), StoredAs())


def check_globs(matrices: Mapping[str, StoredAs], stored: Collection[str]) -> None:
    """Raise `InvalidInput` for a glob that matches none of the matrices stored under these names."""
    names = [name.removesuffix(".weight") for name in stored]
    for glob in matrices:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InvalidInput(f'output.matrices: "{glob}" matches no matrix{suggestion(glob, names)}')
