"""Who keeps how much."""
