"""Modules that the engine puts in a model."""
