"""What a method did to quality, size and speed, dense beside sparse."""
