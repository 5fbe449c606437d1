"""Pure token metrics."""
