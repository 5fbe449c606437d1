"""The ways to choose the blocks that are computed, one per file."""
