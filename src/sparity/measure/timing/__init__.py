"""How speed and memory are measured."""
