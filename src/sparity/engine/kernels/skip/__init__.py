"""Which input channels of a product count, token by token, and the input without the others."""
