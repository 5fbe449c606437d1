"""Cuts that concern more than the projections of one block: the hidden size, whole blocks, whole experts."""
