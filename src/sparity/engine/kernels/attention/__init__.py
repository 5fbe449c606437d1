"""Attention over what a cache holds, read in place: heads of unlike lengths, pages, codes of a few bits."""
