"""`sparity schema`: the recipe's JSON schema, for editors."""

from sparity.cli import console


def schema() -> None:
    """Print the JSON schema of recipes; editors complete and check recipes with it."""
    from sparity.recipe import Recipe

    console.print_json(Recipe.model_json_schema())
