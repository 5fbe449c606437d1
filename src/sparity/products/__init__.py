"""Matrix products in a type that the processor is fast in."""
