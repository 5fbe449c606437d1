"""Ways to make good what skipped activations lose."""
