"""Which blocks of a prompt's attention are computed."""
