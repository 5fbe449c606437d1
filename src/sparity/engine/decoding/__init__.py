"""Decoding: the step from one token to the next, without what costs time and changes nothing."""
