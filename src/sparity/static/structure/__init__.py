"""Whole parts of a model removed, in a shape that stock loaders take."""
