"""What all formats share: the packed object, its values, the order of tiles, and the file."""
