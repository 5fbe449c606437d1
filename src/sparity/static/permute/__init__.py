"""Channels in another order, so that an N:M pattern loses less; the model computes what it computed."""
