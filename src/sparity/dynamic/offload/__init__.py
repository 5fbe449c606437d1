"""Models larger than memory: neurons and experts lie on disk, and come into memory when they are needed."""
