"""Products with weights of which only some rows, or channels, are in memory, in slots of a buffer."""
