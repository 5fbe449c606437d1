"""What methods that work on one matrix share."""
