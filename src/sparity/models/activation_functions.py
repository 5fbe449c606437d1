"""The functions between the projections of a model's MLPs: where they are, and what the configuration calls them."""

from typing import Any

from torch import nn

from sparity.errors import InvalidInput

ACTIVATIONS = ("act_fn", "activation_fn", "act")  # what modules call the function behind gate or fc1
ATTRIBUTES = ("hidden_activation", "hidden_act", "activation_function")  # what configurations do


def activation_functions(root: nn.Module, prefix: str) -> list[tuple[nn.Module, str]]:
    """Each module that holds such a function as a module, with the function's name in it, in the order of the blocks.

    Args:
        root: a model.
        prefix: of the names of the modules that are looked at, such as the path of the blocks.
    """
    return [
        (module, name)
        for path, module in root.named_modules()
        if path.startswith(prefix)
        for name in ACTIVATIONS
        if isinstance(getattr(module, name, None), nn.Module)
    ]


def function_attribute(config: Any) -> str:
    """The attribute of a configuration that names the function.

    Raises:
        InvalidInput: there is none.
    """
    found = next((name for name in ATTRIBUTES if isinstance(getattr(config, name, None), str)), None)
    if found is None:
        raise InvalidInput(f'a model of type "{config.model_type}" names no activation function in its configuration')
    return found
