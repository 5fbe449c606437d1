"""One file per method of sparse training."""
