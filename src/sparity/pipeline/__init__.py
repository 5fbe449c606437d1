"""From a recipe to a checked, measured, saved model."""
