"""Stages that train the whole model: one file per stage."""
