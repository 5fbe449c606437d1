"""Documents show recipes for the same few texts."""

from texts_once import texts_tokenised_once

__all__ = ["texts_tokenised_once"]
