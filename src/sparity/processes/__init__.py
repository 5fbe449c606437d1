"""Processes that do one piece of work together."""
