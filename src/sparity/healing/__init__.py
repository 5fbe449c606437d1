"""Stages that win back what others have cost: one folder per stage."""
