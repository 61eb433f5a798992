"""Recipes: each loads, says what it takes and gives, and the main one is the job of `shoal train`."""

import re
from pathlib import Path

import pytest

from shoal.config import load_config

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXPECTED = r"eval/loss (\d+\.\d+) \(\d+ %\)"

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def header(recipe: Path) -> dict[str, str]:
    """The lines `# key: value` above the first setting."""
    comments = recipe.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    return dict(re.findall(r"^# (command|time|expected): (.+)$", "\n".join(comments), re.MULTILINE))


def test_there_are_recipes():
    assert {"main.yaml", "finetune.yaml", "lstm.yaml", "exact.yaml"} <= {recipe.name for recipe in RECIPES}


@each_recipe
def test_a_recipe_loads(recipe):
    assert load_config(recipe, environ={}).config


@each_recipe
def test_a_recipe_says_command_time_and_expected_loss(recipe):
    said = header(recipe)
    assert set(said) == {"command", "time", "expected"}
    assert said["command"].startswith(f"shoal train recipes/{recipe.name}")
    assert re.match(EXPECTED, said["expected"])


def test_the_main_recipe_is_what_train_does_without_arguments():
    assert load_config(ROOT / "recipes" / "main.yaml", environ={}).config == load_config(environ={}).config
