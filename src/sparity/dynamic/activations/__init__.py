"""Input channels of projections that count for nothing are left out, token by token."""
