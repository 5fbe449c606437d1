"""What the scheduler's IR (module 2.4) says about sparsity."""

from dataclasses import dataclass, field, fields
from typing import Any

from sparity.errors import InvalidInput, suggestion
from sparity.integrations.sagellm.protocol import SparsityConfig
from sparity.integrations.sagellm.selector import DeviceInfo, select_sparse_kernel

DENSE = "dense_fallback_kernel"


@dataclass
class IRNode:
    """A node of the scheduler's plan, as far as sparsity is concerned."""

    type: str
    config: dict[str, Any] = field(default_factory=dict)


def config_of(node: Any) -> SparsityConfig | None:
    """The configuration that a node hands down, with the defaults for what it leaves out; None where it has none.

    Args:
        node: anything with a `config` dictionary.

    Raises:
        InvalidInput: an unknown field, or a value of the wrong kind.
    """
    given = node.config.get("sparsity")
    if given is None:
        return None
    known = [each.name for each in fields(SparsityConfig)]
    for name in given:
        if name not in known:
            raise InvalidInput(f'IR node "{node.type}": no sparsity field {name!r}{suggestion(str(name), known)}')
    return SparsityConfig(**given)


def kernel_of(node: Any, device_info: DeviceInfo | None = None) -> str:
    """The kernel of a node: the selector's where `use_sparse_kernel` says so, else the dense one.

    Raises:
        InvalidInput: `use_sparse_kernel` without a configuration to select by.
    """
    config = config_of(node)
    if not node.config.get("use_sparse_kernel", False):
        return DENSE
    if config is None:
        raise InvalidInput(f'IR node "{node.type}": use_sparse_kernel needs "sparsity" beside it')
    return select_sparse_kernel(config, DeviceInfo.here() if device_info is None else device_info)
