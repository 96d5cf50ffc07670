"""Every recipe of EasyR1 and of the release makes a dry run, with a small model and small data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from spatialthinker.synthetic import generate
from tests.support.upstream import Recipe, read_program, read_recipes, resolve, write_config
from verl.trainer import main as program

TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"
NUM_ROWS = 512
FILES = {
    ".jinja": "{{ content }} Think first, then answer.",
    ".py": "def compute_score(items, **kwargs):\n"
    "    return [{'overall': float(item['response'] == '5')} for item in items]\n",
}


class RewardsHere:
    """A reward pool without processes, which all recipes would start anew."""

    def __init__(self, function: Any, *_: Any):
        self.function = function[""]

    def start(self) -> None:
        pass

    def probe(self, response: str, problem: str, ground_truth: Any, row: str, **more: Any) -> dict[str, float]:
        item = {"response": response, "response_length": 0, "ground_truth": ground_truth, "problem": problem}
        return {key: float(value) for key, value in self.function([item])[0].items()}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data set with the columns of all recipes, whose images lie in two of them."""
    folder = tmp_path_factory.mktemp("rows")
    drawn = []
    for _, row in generate(8, seed=1):
        image = {"bytes": row.images, "path": None}
        drawn.append(vars(row) | {"answer": "5", "images": [image], "image": image})
    for split, number in (("train", NUM_ROWS), ("val", 8), ("test", 8)):
        repeated = [drawn[index % len(drawn)] for index in range(number)]
        Dataset.from_list(repeated).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The toy model with as many heads and positions as recipes ask for; no run comes to its weights."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(TOY_MODEL, folder)
    settings = json.loads((folder / "config.json").read_text())
    changed = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 32_768}
    settings["text_config"] |= changed
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def dry_run(rows, model, tmp_path, monkeypatch, capsys):
    def start(recipe: Recipe) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("verl.reward.RewardManager", RewardsHere)
        values = resolve(recipe)
        for key in ("data.format_prompt", "worker.reward.reward_function"):
            file = Path(str(values.get(key)).partition(":")[0])
            if file.suffix in FILES:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(FILES[file.suffix])
        small = [f"{key}={rows}@{values[key].partition('@')[2]}" for key in ("data.train_files", "data.val_files")]
        small += [f"worker.actor.model.model_path={model}", "trainer.device=cpu", "trainer.dry_run=true"]
        small += ["trainer.logger=[console]", "trainer.check_versions=false"]
        arguments = [f"config={write_config(recipe.program, tmp_path)}", *recipe.arguments, *small]
        code = program.main(arguments)
        return code, *capsys.readouterr()

    return start


@pytest.mark.integration
@pytest.mark.parametrize("recipe", read_recipes(), ids=str)
def test_a_recipe_makes_a_dry_run_or_says_why_not(dry_run, recipe):
    code, printed, complained = dry_run(recipe)
    if recipe.stop:
        assert code == program.USER_ERROR and recipe.stop in complained and "1 fault" in complained
        return
    assert code == 0, complained
    values = resolve(recipe)
    prompts, n, ranks = (
        values[key] for key in ("data.rollout_batch_size", "worker.rollout.n", "trainer.n_gpus_per_node")
    )
    per_epoch = NUM_ROWS // prompts
    epochs = values.get("trainer.total_epochs") or values["trainer.total_episodes"]
    assert f"Steps: {values['trainer.max_steps'] or per_epoch * epochs} of {prompts} prompts each" in printed
    assert f"{prompts} prompts x {n} responses = {prompts * n} responses a step" in printed
    updates = prompts // values["worker.actor.global_batch_size"]
    assert f"Updates: {updates} a step" in printed and f"of {ranks} ranks" in printed
    assert printed.count("Reward of the ground truth: ") == 3


@pytest.mark.integration
@pytest.mark.parametrize("program_name", ["easyr1", "release"])
def test_the_programs_own_yaml_alone_makes_a_dry_run(dry_run, program_name):
    recipe = Recipe(program_name, "none", ("trainer.n_gpus_per_node=2",), None)
    assert yaml.safe_dump(read_program(program_name)["config"])
    assert dry_run(recipe)[0] == 0
