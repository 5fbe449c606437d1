"""Attention of a prompt by blocks of queries and keys, of which some are left out."""
