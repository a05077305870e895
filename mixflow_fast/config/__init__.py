"""The configuration of a run: sections, recipes, overrides, and what is refused."""

from mixflow_fast.config.loading import from_dict, load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.recipes import recipe_names

__all__ = ["Config", "from_dict", "load_config", "recipe_names"]
