"""The configuration of a run: sections, recipes, overrides, and what is refused."""

from mixflow_fast.config.loading import from_dict, load_config, recipe_names
from mixflow_fast.config.schema import Config

__all__ = ["Config", "from_dict", "load_config", "recipe_names"]
