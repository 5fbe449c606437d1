"""What belongs to open files and threads stays where it is."""

from typing import Any, NoReturn

from sparity.errors import InvalidInput


class Fixed:
    """Refuses to be copied and pickled, and the model that it is a part of with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse()

    def __getstate__(self) -> NoReturn:
        refuse()


def refuse(*arguments: Any, **named: Any) -> NoReturn:
    """Raise `InvalidInput`."""
    raise InvalidInput(
        "a model whose weights are on disk cannot be copied, pickled or saved: its folder is what can be copied"
    )
