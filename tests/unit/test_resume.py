"""A run goes on only with what it was trained with; each key says whether it may change, and what differs is named."""

import dataclasses
import io
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model
from verl.config.fields import find_keys
from verl.config.loading import config_to_dict
from verl.config.records import Config, ConfigError
from verl.data.dataset import DataError, RLHFDataset
from verl.distributed import checkpoint
from verl.trainer.resume import APPLIED, BY_CONTENT, WITHOUT_EFFECT, _values, check_resume, identify

LISTS = {
    "free": WITHOUT_EFFECT,
    "applied": APPLIED,
    "by content": [key for keys in BY_CONTENT.values() for key in keys],
}
KNOWN = {"data": "d", "val_data": "v", "base_model": "b", "critic_base_model": None, "tokenizer": "t"}


def change(config: Any, key: str, value: Any) -> Any:
    """The configuration with another value of one key."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: change(getattr(config, name), rest, value) if rest else value})


def write(root: Path, config: Any, **state: Any) -> Path:
    """A checkpoint's state alone."""
    folder = root / "global_step_3"
    folder.mkdir()
    content = {"config": config_to_dict(config), "identity": KNOWN, "model_only": False} | state
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(content))
    return folder


def refusal(folder: Path, config: Config, identity: dict[str, str | None] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_resume(folder, config, identity or KNOWN)
    return str(caught.value)


def test_the_same_run_goes_on_without_a_word(tmp_path):
    assert check_resume(write(tmp_path, Config()), Config(), KNOWN) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("worker.actor.model.lora.alpha", 8),
        ("worker.actor.model.lora.rank", 4),
        ("worker.actor.model.lora.exclude_modules", ".*visual.*"),
        ("worker.actor.optim.weight_decay", 0.3),
        ("worker.actor.optim.betas", (0.9, 0.95)),
        ("worker.actor.optim.strategy", "adamw"),
        ("worker.critic.optim.weight_decay", 0.3),
        ("worker.actor.fsdp.torch_dtype", "fp32"),
        ("data.rollout_batch_size", 256),
        ("data.mini_rollout_batch_size", 256),
        ("worker.actor.global_batch_size", 64),
        ("data.shuffle", False),
        ("data.seed", 2),
        ("worker.rollout.n", 4),
        ("worker.rollout.temperature", 0.5),
        ("algorithm.adv_estimator", "rloo"),
        ("algorithm.online_filtering", True),
    ],
)
def test_a_key_that_must_stay_is_refused_by_name_with_both_values_and_the_way_out(tmp_path, key, value):
    folder = write(tmp_path, Config())
    message = refusal(folder, change(Config(), key, value))
    then = _values(config_to_dict(Config()))[key]
    for words in (f"{key} = ", str(folder), f"set {key}={then}", "start a new run", "model_merger.py"):
        assert words in message
    assert message.startswith("1 fault")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("worker.actor.optim.lr", 5e-7),
        ("trainer.max_steps", 100),
        ("worker.actor.optim.lr_scheduler_type", "cosine"),
        ("worker.actor.max_grad_norm", 0.5),
        ("algorithm.kl_coef", 0.1),
        ("worker.reward.score_function", "math"),
        ("worker.rollout.val_override_config", {"temperature": 0.1, "n": 1}),
    ],
)
def test_a_key_that_may_change_is_applied_and_said(tmp_path, key, value):
    (note,) = check_resume(write(tmp_path, Config()), change(Config(), key, value), KNOWN)
    assert note.startswith(key) and "changes from" in note


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.n_gpus_per_node", 8),
        ("trainer.save_limit", 9),
        ("worker.actor.offload.offload_params", True),
        ("worker.actor.micro_batch_size_per_device_for_update", 1),
        ("worker.rollout.gpu_memory_utilization", 0.5),
        ("worker.actor.model.model_path", "/elsewhere"),
        ("data.train_files", "/elsewhere@train"),
    ],
)
def test_a_key_that_changes_nothing_is_free(tmp_path, key, value):
    assert check_resume(write(tmp_path, Config()), change(Config(), key, value), KNOWN) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data", ["data.train_files", "training rows"]),
        ("base_model", ["worker.actor.model.model_path", "base model"]),
        ("tokenizer", ["tokenizer"]),
    ],
)
def test_another_fingerprint_is_refused(tmp_path, name, words):
    message = refusal(write(tmp_path, Config()), Config(), KNOWN | {name: "other"})
    assert all(word in message for word in (*words, "start a new run"))


def test_all_differences_come_together(tmp_path):
    config = change(change(Config(), "data.seed", 2), "worker.rollout.n", 4)
    assert refusal(write(tmp_path, config), Config(), KNOWN | {"data": "other"}).startswith("3 faults")


def test_an_adaptive_weight_is_the_checkpoints(tmp_path):
    config = change(Config(), "algorithm.kl_type", "adaptive")
    assert "algorithm.kl_coef" in refusal(write(tmp_path, config), change(config, "algorithm.kl_coef", 0.1))


def test_weights_alone_take_any_optimizer(tmp_path):
    folder = write(tmp_path, Config(), model_only=True)
    (note,) = check_resume(folder, change(Config(), "worker.actor.optim.weight_decay", 0.3), KNOWN)
    assert "worker.actor.optim.weight_decay" in note


def test_an_older_checkpoint_goes_on_and_one_line_says_what_is_not_known(tmp_path):
    folder = write(tmp_path, Config(), identity=None)
    (note,) = check_resume(folder, change(Config(), "data.train_files", "/elsewhere@train"), KNOWN)
    assert "holds no fingerprints" in note
    state = checkpoint.read_trainer_state(folder)
    del state["config"]["worker"]["rollout"]["seed"]  # a key that came later
    state["config"]["worker"]["rollout"]["gone"] = 1
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(state))
    assert len(check_resume(folder, Config(), KNOWN)) == 1


def test_unknown_fingerprints_are_not_compared_and_validation_rows_are_said(tmp_path):
    folder = write(tmp_path, Config(), identity=KNOWN | {"base_model": None})
    (note,) = check_resume(folder, Config(), KNOWN | {"val_data": "other"})
    assert "validation rows" in note


def test_every_stated_key_exists():
    keys = find_keys()
    for pattern in (pattern for patterns in LISTS.values() for pattern in patterns):
        assert any(fnmatchcase(key, pattern) for key in keys), pattern


def store(config: dict[str, Any], key: str, *value: Any) -> dict[str, Any]:
    """A stored configuration with another value of one key, or without it."""
    name, _, rest = key.partition(".")
    others = {other: section for other, section in config.items() if other != name}
    if rest:
        return others | {name: store(config[name], rest, *value)}
    return others | dict(zip([name], value, strict=False))


@pytest.mark.parametrize("key", find_keys())
def test_no_key_is_forgotten(tmp_path, key):
    """Whatever is not listed must stay; what a checkpoint does not know is said."""
    is_listed = {name: any(fnmatchcase(key, pattern) for pattern in keys) for name, keys in LISTS.items()}
    config = change(Config(), "algorithm.kl_type", "adaptive")  # with a fixed one its weight is applied
    folder = write(tmp_path, store(config_to_dict(config), key, "another"))
    if not any(is_listed.values()):
        message = refusal(folder, config)
        assert message.startswith("1 fault") and f"{key} = " in message
    else:
        assert len(check_resume(folder, config, KNOWN)) == (is_listed["applied"] and not is_listed["free"])


@pytest.mark.parametrize("key", ["worker.actor.model.override_config", "worker.critic.model.override_config"])
@pytest.mark.parametrize(("then", "now"), [({}, {"a": 1}), ({"a": 1}, {}), ({"a": 1}, {"a": 1, "b": 2})])
def test_a_free_key_that_came_or_went_is_a_change(tmp_path, key, then, now):
    message = refusal(write(tmp_path, change(Config(), key, then)), change(Config(), key, now))
    assert f"{key} = {now!r}" in message and f"set {key}={then}" in message


@pytest.mark.parametrize(("then", "now"), [({}, {"a": 1}), ({"a": 1}, {})])
def test_a_free_key_of_a_reward_is_applied_and_said(tmp_path, then, now):
    key = "worker.reward.reward_function_kwargs"
    (note,) = check_resume(write(tmp_path, change(Config(), key, then)), change(Config(), key, now), KNOWN)
    assert note == f"{key} changes from {then} to {now}"


def test_a_key_that_the_checkpoint_does_not_know_is_said(tmp_path):
    folder = write(tmp_path, store(config_to_dict(Config()), "data.resize_first"))
    assert check_resume(folder, Config(), KNOWN) == []
    (note,) = check_resume(folder, change(Config(), "data.resize_first", True), KNOWN)
    assert note.startswith("data.resize_first = True") and "older than this key" in note and "False" in note


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    return folder


def rows() -> list[dict[str, Any]]:
    pictures = [{"bytes": row.images, "path": None} for _, row in generate(4, seed=1)]
    return [
        {"problem": f"<image> {number}?", "answer_option_text": "A", "images": picture}
        for number, picture in enumerate(pictures)
    ]


def fingerprints(
    inputs: Path, folder: Path, content: list[dict[str, Any]], model: str = "model", reward: str | None = None
) -> dict[str, Any]:
    folder.mkdir()
    Dataset.from_list(content).to_parquet(folder / "train-0.parquet")
    processor = AutoProcessor.from_pretrained(inputs / "model")
    prompts = RLHFDataset(f"{folder}@train", processor)
    config = change(Config(), "worker.actor.model.model_path", str(inputs / model))
    config = change(config, "worker.reward.reward_function", reward)
    return identify(config, processor, prompts, prompts)


def test_columns_count_where_a_reward_of_your_own_can_read_them(inputs, tmp_path):
    content = [row | {"level": number, "mask": b"x"} for number, row in enumerate(rows())]
    other = [content[0] | {"level": 9}, *content[1:]]
    built_in = [fingerprints(inputs, tmp_path / f"a{i}", some) for i, some in enumerate((content, other))]
    own = [fingerprints(inputs, tmp_path / f"b{i}", some, reward="r.py:f") for i, some in enumerate((content, other))]
    assert built_in[0] == built_in[1] and built_in[0]["columns"] is None
    assert own[0]["data"] == own[1]["data"] == built_in[0]["data"]
    assert own[0]["columns"] != own[1]["columns"]
    older = {name: value for name, value in own[0].items() if name != "columns"}
    (tmp_path / "old").mkdir()
    assert check_resume(write(tmp_path / "old", Config(), identity=older), Config(), own[0]) == []
    assert "columns that a reward" in refusal(write(tmp_path, Config(), identity=own[0]), Config(), own[1])


def test_the_fingerprint_of_rows_is_their_content_in_its_order(inputs, tmp_path):
    content = rows()
    first = fingerprints(inputs, tmp_path / "first", content)
    assert fingerprints(inputs, tmp_path / "copy", content) == first
    swapped = [content[1], content[0], *content[2:]]
    image = [content[0] | {"images": content[1]["images"]}, *content[1:]]
    answer = [content[0] | {"answer_option_text": "B"}, *content[1:]]
    changed = {"lost": content[:2] + content[3:], "swapped": swapped, "image": image, "answer": answer}
    found = {fingerprints(inputs, tmp_path / name, some)["data"] for name, some in changed.items()}
    assert len(found | {first["data"]}) == 5


def test_a_broken_image_is_left_to_the_step_that_needs_it(inputs, tmp_path):
    """Fingerprints are of stored images: scaling every picture of a large data set first would take its time."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    broken = whole.getvalue()[:1000] + bytes(500) + whole.getvalue()[1500:]
    pictures = [{"bytes": data, "path": None} for data in (whole.getvalue(), broken)]
    content = [{"problem": "<image>?", "answer_option_text": "A", "images": picture} for picture in pictures]
    Dataset.from_list(content).to_parquet(tmp_path / "train-0.parquet")
    processor = AutoProcessor.from_pretrained(inputs / "model")
    bounds: dict[str, Any] = {"min_pixels": None, "max_pixels": 32 * 32, "resize_first": True, "on_bad_row": "skip"}
    prompts = RLHFDataset(f"{tmp_path}@train", processor, **bounds)
    with pytest.raises(DataError, match="row 1"):
        prompts[1]
    config = change(Config(), "worker.actor.model.model_path", str(inputs / "model"))
    assert identify(config, processor, prompts, prompts)["data"]


def test_one_other_number_of_the_base_is_another_base(inputs, tmp_path):
    first = fingerprints(inputs, tmp_path / "first", rows())
    save_tiny_model(inputs / "other")
    (file,) = (inputs / "other").glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    second = fingerprints(inputs, tmp_path / "second", rows(), "other")
    assert {key for key in first if first[key] != second[key]} == {"base_model"}
