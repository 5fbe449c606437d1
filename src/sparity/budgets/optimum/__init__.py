"""Exact solutions of what budgets and searches choose from."""
