"""Which weights, bits and inputs to give up where, for the most speed or the fewest bytes within a limit."""
