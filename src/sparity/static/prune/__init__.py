"""Zeros in the weights: scores, patterns, solvers, and the stage that composes them."""
