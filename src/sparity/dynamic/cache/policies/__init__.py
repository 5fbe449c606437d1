"""The rules by which tokens stay in a cache, one per file."""
