"""One run: from a checked recipe to a published folder."""
