"""How the tokens of several sequences are computed, so that none depends on the others."""
