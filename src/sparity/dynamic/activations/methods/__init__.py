"""How the channels that are skipped are chosen: one file per method."""
