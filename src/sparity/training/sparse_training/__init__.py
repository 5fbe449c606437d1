"""Sparsity that comes about in training: the stage, and a file for each method."""
