"""A recipe: everything that decides the result of a run."""

from ricciq.recipe.recipe import MAX_BYTES as MAX_BYTES
from ricciq.recipe.recipe import NONE as NONE
from ricciq.recipe.recipe import Recipe as Recipe
from ricciq.recipe.recipe import find_recipe as find_recipe
from ricciq.recipe.recipe import recipe_folder as recipe_folder
from ricciq.recipe.recipe import shipped_recipes as shipped_recipes
from ricciq.recipe.sections import Count as Count
from ricciq.recipe.sections import MethodSection as MethodSection
from ricciq.recipe.sections import TrainingSection as TrainingSection
