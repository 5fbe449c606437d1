"""What makes zeros fast: formats that store a sparse weight, and kernels that read it."""
