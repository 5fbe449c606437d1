"""What one decoding step computes between its products: norms, attention over the cache, gated activations."""
