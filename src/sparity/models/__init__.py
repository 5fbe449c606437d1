"""A transformer as Sparity sees it: a decoder of blocks, a block of projections."""

from sparity.models.block import Block, BlockInputs, InputSite, Projection
from sparity.models.decoder import Decoder

__all__ = ["Block", "BlockInputs", "Decoder", "InputSite", "Projection"]
