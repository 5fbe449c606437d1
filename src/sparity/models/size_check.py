"""Whether files can hold what a configuration describes, before a model of its sizes is built."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparity.errors import CorruptFile
from sparity.memory import check_memory
from sparity.models import transformers as hf

AGAIN = "it belongs to another model, or shards are missing; fetch the folder again"
NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.)")  # of a layer or an expert, in a tensor's name
MORE_LAYERS, MORE_PARAMETERS = 64, 2**27  # that may be missing: loading names which


def check_sizes(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration of far more layers or parameters than the shards of a folder hold.

    Raises:
        CorruptFile: it belongs to another model.
        InvalidInput: its masks and tables do not fit into memory.
        UnsupportedModel: transformers cannot build it.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    held = max((int(number) for name in shapes for number in NUMBER.findall(name)), default=0) + 1
    if isinstance(layers, int) and layers > held + MORE_LAYERS:
        raise CorruptFile(f"{folder}: config.json says {layers:,} layers, and the files hold {held:,}: {AGAIN}")
    outline = hf.outline_model(config)
    described, stored = _count(outline), sum(map(math.prod, shapes.values()))
    if described > 2 * stored + MORE_PARAMETERS:  # twice: a head that is stored as the embedding
        raise CorruptFile(
            f"{folder}: config.json describes {described:,} parameters, and the files hold {stored:,}: {AGAIN}"
        )
    tables = sum(buffer.nbytes for buffer in outline.buffers())
    check_memory(f"{folder}: what the model computes from its configuration", tables, "see max_position_embeddings")


def _count(outline: nn.Module) -> int:
    return sum(parameter.numel() for parameter in outline.parameters())
