"""Fewer bits for the weights that stay."""
