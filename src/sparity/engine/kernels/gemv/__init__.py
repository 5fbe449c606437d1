"""A weight times a few inputs: what decoding spends its time on."""
