"""Recipes: one TOML file each, all that decides what comes out of a training (:class:`robench.recipe.Recipe`)."""
