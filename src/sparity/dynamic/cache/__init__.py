"""Which keys and values of the past stay in a model's cache."""
