"""Every recipe of EasyR1 and of the release means here what it means there, or is refused for a stated reason."""

import re
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS
from tests.support.upstream import PROGRAMS, Recipe, flatten, read_recipes, render_table, resolve, write_config
from verl.config.loading import config_to_dict, load_config
from verl.config.old_keys import RENAMED_KEYS, SETTLED_KEYS
from verl.config.records import Config, ConfigError

RECIPES = read_recipes()
PAGE = Path(__file__).resolve().parents[2] / "docs" / "upstream_recipes.md"
TYPES = {None: "fp32", "bfloat16": "bf16", "float32": "fp32"}


@pytest.fixture(autouse=True)
def program_folder(tmp_path, monkeypatch):
    """A working folder with the files that recipes name, as the program's own checkout has them."""
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES:
        for key, value in resolve(recipe).items():
            if key == "data.format_prompt" and str(value).endswith(".jinja"):
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).write_text("{{ content }} Think first.")
            elif key == "worker.reward.reward_function":
                file = Path(value.partition(":")[0])
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("def compute_score(items, **kwargs): return [{'overall': 0.0}] * len(items)\n")


def load(recipe: Recipe, folder: Path) -> Config:
    return load_config([f"config={write_config(recipe.program, folder)}", *recipe.arguments], tuple(REWARDS))


def our_values(recipe: Recipe) -> dict[str, object]:
    """Settings of the recipe in its own program, under the names here and as values are written here."""
    values = {}
    for key, value in resolve(recipe).items():
        name = RENAMED_KEYS.get(key, key)
        if name in SETTLED_KEYS:
            continue
        if name.endswith("torch_dtype"):
            value = TYPES.get(value, value)
        if isinstance(value, str) and value.partition(":")[0].endswith((".py", ".jinja")):
            value = str(Path(value.partition(":")[0]).absolute()) + "".join(value.partition(":")[1:])
        if name == "trainer.save_checkpoint_path" and value:
            value = str(Path(value).absolute())
        values[name] = value
    return values


def test_there_are_as_many_recipes_as_are_published():
    assert len(RECIPES) == 32 and {recipe.program for recipe in RECIPES} == set(PROGRAMS)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.stop], ids=str)
def test_a_recipe_means_the_same(recipe, tmp_path):
    config = load(recipe, tmp_path)
    found = flatten(config_to_dict(config))
    meant = our_values(recipe)
    if meant.get("trainer.save_checkpoint_path") is None:
        names = meant["trainer.project_name"], meant["trainer.experiment_name"]
        meant["trainer.save_checkpoint_path"] = str(Path("checkpoints", *map(str, names)).absolute())
    differing = {key: (value, found.get(key)) for key, value in meant.items() if found.get(key) != value}
    assert not differing
    # What upstream has no name for stays what it is here, but for the resizing that upstream always does.
    defaults = flatten(config_to_dict(Config()))
    own = {key for key in defaults if key not in meant and not key.startswith("worker.critic")}
    changed = {key for key in own if key in found and found[key] != defaults[key]}
    allowed = {"data.resize_first", "worker.reward.score_function", "trainer.find_last_checkpoint"}
    assert "data.resize_first" in changed and changed <= allowed


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.stop], ids=str)
def test_a_recipe_that_asks_for_what_is_not_there_is_refused_by_name(recipe, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(str(recipe.stop))) as caught:
        load(recipe, tmp_path)
    assert len(caught.value.faults) == 1


def test_the_page_has_the_table_of_all_recipes():
    assert render_table() in PAGE.read_text(encoding="utf-8")
