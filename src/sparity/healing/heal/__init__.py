"""Heal: a sparse model is brought nearer to the dense one, and keeps its zeros."""
