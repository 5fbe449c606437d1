"""What stages decide from: statistics, hidden states, trials."""
