"""Sparsity that is decided per token, while the model runs."""
