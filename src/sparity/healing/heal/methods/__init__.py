"""Ways to bring a sparse model nearer to the dense one."""
