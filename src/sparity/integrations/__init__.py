"""Adapters outward."""
