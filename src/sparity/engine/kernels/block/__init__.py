"""A weight of stored blocks times any number of inputs; `gemv.reference` says what it means."""
