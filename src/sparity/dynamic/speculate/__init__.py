"""Lossless decoding with a model that skips activations: it drafts, and checks its own draft densely."""
