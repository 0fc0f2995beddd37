"""`ricciq recipes`: list, show, copy and check recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ricciq.cli import options
from ricciq.errors import RecipeError, RicciqError, UsageError
from ricciq.report.terminal import keys_table, recipes_table, show

app = typer.Typer(
    help="List, show, copy and check recipes.\n\nExample: ricciq recipes ls",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Name = Annotated[str, typer.Argument(help=options.RECIPE, autocompletion=options.of_recipes)]
Names = Annotated[list[str], typer.Argument(help=options.RECIPE, autocompletion=options.of_recipes)]


@app.command("ls")
def list_recipes(as_json: options.Json = False) -> None:
    """List the shipped recipes.

    Example: ricciq recipes ls --json
    """
    from ricciq.recipe import Recipe, shipped_recipes

    rows = [
        {
            "name": name,
            "model": recipe.model.name,
            "weight_bits": recipe.quantization.weight_bits,
            "act_bits": recipe.quantization.act_bits,
            "data": recipe.data.name,
            "epochs": recipe.training.epochs,
        }
        for name, recipe in ((name, Recipe.load(name)) for name in shipped_recipes())
    ]
    show({"recipes": rows}, as_json, recipes_table)


@app.command("show")
def show_recipe(name: Name) -> None:
    """Print a valid recipe as it is written, including comments.

    Example: ricciq recipes show resnet50-w4a4
    """
    from ricciq.recipe import Recipe, find_recipe

    Recipe.load(name)  # an invalid file is refused, not sent to the terminal
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command("cp")
def copy_recipe(
    name: Name,
    target: Annotated[Path, typer.Argument(help="File or folder to copy to.")] = Path("."),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file.")] = False,
    dry_run: options.DryRun = False,
) -> None:
    """Copy a recipe, to edit the copy and use it with --recipe.

    Example: ricciq recipes cp resnet50-w4a4 mine.yaml

    Example: ricciq recipes cp resnet50-w4a4 --dry-run
    """
    from ricciq.recipe import Recipe, find_recipe
    from ricciq.system.files import write_atomically

    Recipe.load(name)  # refuses an invalid file
    source = find_recipe(name)
    file = target / source.name if os.path.isdir(target) else target
    if os.path.exists(file) and not overwrite:
        raise UsageError(f"{file} exists already; give --overwrite or another TARGET")
    if not os.path.isdir(file.parent):
        raise UsageError(f"there is no folder {file.parent}; create it, or give another TARGET")
    if not dry_run:
        try:
            write_atomically(file, source.read_bytes())
        except (OSError, RicciqError) as error:
            raise UsageError(f"{file} cannot be written ({error}); give another TARGET") from None
    print(f"would write {file}" if dry_run else f"{file} is written")


@app.command("keys")
def show_keys(
    section: Annotated[
        str | None, typer.Argument(help="Section, such as training or data.augmentation.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show every key of a recipe with its type, default and description.

    Example: ricciq recipes keys training
    """
    from ricciq.cli.keys import recipe_keys

    show({"keys": recipe_keys(section)}, as_json, keys_table)


@app.command("check")
def check_recipes(names: Names, as_json: options.Json = False) -> None:
    """Check whether recipes are valid. All are checked; if one is invalid, exit with 2.

    Example: ricciq recipes check resnet50-w4a4 fashion-low
    """
    errors = {name: _error_in(name) for name in names}
    if as_json:
        rows = [{"recipe": name, "error": error} for name, error in errors.items()]
        show({"recipes": rows}, as_json)
    else:
        for name, error in errors.items():
            print(f"{name} is invalid" if error else f"{name} is valid")
    if bad := [error for error in errors.values() if error]:
        raise RecipeError("; ".join(bad))


def _error_in(name: str) -> str | None:
    """Why a recipe is invalid, including what only a run checks."""
    from ricciq.data.preprocessing import Preprocessing
    from ricciq.estimators.registry import named_estimator
    from ricciq.recipe import Recipe
    from ricciq.training.optim import check_training

    try:
        recipe = Recipe.load(name)
        named_estimator(recipe.method.name, recipe.method.changes)
        check_training(recipe.training)
        recipe.data.augmentation.transform(Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3))
    except UsageError as error:
        return str(error)
    return None
