"""Which of a token's experts weigh so little that they are skipped."""
