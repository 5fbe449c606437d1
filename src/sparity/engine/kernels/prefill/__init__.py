"""A weight times many inputs: what reading a prompt spends its time on."""
