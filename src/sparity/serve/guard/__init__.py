"""A guard of quality: what a dense model says of a sample of the sparse model's answers, and when that is too much."""
