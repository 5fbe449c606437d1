"""Scales moved from what writes a channel to what reads it, so that fewer bits lose less."""
