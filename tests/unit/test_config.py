"""The configuration: defaults, sources and their precedence, and one error for all faults."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from verl.config.choices import read_names
from verl.config.fields import find_keys
from verl.config.loading import config_to_dict, load_config
from verl.config.records import Config, ConfigError, DataConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.max_prompt_length=64",
    "data.max_response_length=32",
    "data.rollout_batch_size=8",
    "worker.actor.global_batch_size=4",
    "trainer.n_gpus_per_node=2",
]


def faults_of(*argv: str, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([*SMALL, *argv], **kwargs)
    return caught.value.faults


def test_the_defaults_are_the_papers_run():
    config = load_config([])
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size, config.worker.rollout.n) == (
        512,
        128,
        8,
    )
    assert (config.data.max_prompt_length, config.data.max_response_length) == (6144, 2048)
    assert config.worker.actor.optim.lr == 1e-6 and config.trainer.max_steps == 75 and config.num_ranks == 4
    assert config.algorithm.kl_coef == 1e-2 and config.algorithm.kl_penalty == "low_var_kl"
    assert config.trainer.save_checkpoint_path.endswith("checkpoints/spatialthinker/spatialthinker_3b_grpo")


def test_the_command_line_wins_over_the_file_and_dictionaries_are_merged(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {rollout_batch_size: 16, seed: 7}\n"
        "worker:\n  rollout: {val_override_config: {temperature: 0.6, top_p: 0.95}}\n"
        "trainer: {experiment_name: from_file}\n"
    )
    config = load_config(
        [*SMALL, f"config={file}", "data.rollout_batch_size=12", 'worker.rollout.val_override_config={"n": 4}']
    )
    assert config.data.rollout_batch_size == 12 and config.data.seed == 7
    assert config.worker.rollout.val_override_config == {"temperature": 0.6, "top_p": 0.95, "n": 4}
    assert config.trainer.save_checkpoint_path.endswith("spatialthinker/from_file")


@pytest.mark.parametrize(
    ("argument", "section", "name", "value"),
    [
        ("worker.actor.optim.betas=[0.9,0.95]", "worker.actor.optim", "betas", (0.9, 0.95)),
        ("worker.actor.optim.lr=1", "worker.actor.optim", "lr", 1.0),
        ("worker.actor.fsdp.torch_dtype=float32", "worker.actor.fsdp", "torch_dtype", "fp32"),
        ("worker.actor.fsdp.torch_dtype=null", "worker.actor.fsdp", "torch_dtype", "fp32"),
        ("trainer.max_steps=null", "trainer", "max_steps", None),
        ("trainer.logger=[console]", "trainer", "logger", ("console",)),
        ("algorithm.disable_kl=yes", "algorithm", "disable_kl", True),
        ("data.train_files=owner/name@part", "data", "train_files", "owner/name@part"),
    ],
)
def test_values_are_yaml_of_the_annotated_type(argument, section, name, value):
    record = load_config([*SMALL, argument])
    for part in section.split("."):
        record = getattr(record, part)
    assert getattr(record, name) == value


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("data.rollout_batchsize=16", ["data.rollout_batchsize", "unknown key", "data.rollout_batch_size"]),
        ("trainer.temperature=2", ["trainer.temperature", "worker.rollout.temperature"]),
        ("data.rollout_batch_size=8.0", ["data.rollout_batch_size = 8.0", "whole number"]),
        ("data.shuffle=maybe", ["data.shuffle", "true or false"]),
        ("data.seed=true", ["data.seed", "whole number"]),
        ("data.prompt_key=null", ["data.prompt_key", "text"]),
        ("data=4", ["data = 4", "section"]),
        ("data.seed", ["data.seed", "key=value"]),
        ("data.train_files=@train", ["data.train_files = '@train'", "is no file, folder or hub name"]),
        ("config=no/such.yaml", ["no/such.yaml", "cannot be read"]),
        ("trainer.logger=console", ["trainer.logger", "[console]"]),
        ("trainer.logger=[console,wandbb]", ["trainer.logger", "console, file, tensorboard"]),
        ("trainer.logger=[]", ["trainer.logger", "at least 1 value"]),
        ("algorithm.adv_estimator=gae2", ["algorithm.adv_estimator", "grpo"]),
        ("algorithm.kl_penalty=k3", ["algorithm.kl_penalty", "low_var_kl"]),
        ("worker.actor.optim.betas=[0.9]", ["worker.actor.optim.betas", "2 values"]),
        ("worker.actor.optim.betas=[0.9,1.0]", ["worker.actor.optim.betas", "below 1"]),
        ("worker.actor.optim.lr=.inf", ["worker.actor.optim.lr", "finite"]),
        ("worker.rollout.n=1", ["got a group of 1; raise worker.rollout.n"]),
        ("worker.rollout.temperature=0", ["worker.rollout.temperature = 0", "above 0"]),
        ("worker.rollout.top_p=0", ["worker.rollout.top_p", "at most 1"]),
        ("worker.rollout.max_num_batched_tokens=95", ["max_num_batched_tokens = 95", "96"]),
        ("worker.rollout.max_model_len=95", ["max_model_len = 95", "96"]),
        ("worker.rollout.max_model_len=9000", ["max_num_batched_tokens = 8192", "9000", "enable_chunked_prefill"]),
        ("worker.rollout.tensor_parallel_size=4", ["tensor_parallel_size = 4", "= 2"]),
        ("worker.rollout.val_override_config={temperature: 0, n: 2}", ["val_override_config.n = 2", "temperature 0"]),
        ("worker.rollout.val_override_config={temprature: 0}", ["temprature", "unknown key"]),
        ("worker.rollout.val_override_config={n: 0}", ["val_override_config.n = 0", "at least 1"]),
        ("worker.actor.global_batch_size=3", ["data.rollout_batch_size = 8", "global_batch_size = 3"]),
        ("worker.actor.clip_ratio_low=1.1", ["worker.actor.clip_ratio_low = 1.1", "from 0 to 1"]),
        ("worker.actor.tau_negative=0", ["worker.actor.tau_negative = 0", "above 0"]),
        ("worker.actor.tis_imp_ratio_cap=0", ["worker.actor.tis_imp_ratio_cap = 0", "above 0"]),
        ("worker.actor.loss_type=ppo", ["worker.actor.loss_type", "gspo_token"]),
        ("worker.actor.loss_avg_mode=sum", ["worker.actor.loss_avg_mode", "fixed_length"]),
        ("worker.critic.cliprange_value=0", ["worker.critic.cliprange_value = 0", "above 0"]),
        ("worker.critic.loss_avg_mode=sum", ["worker.critic.loss_avg_mode", "fixed_length"]),
        ("trainer.critic_warmup=-1", ["trainer.critic_warmup = -1", "at least 0"]),
        ("trainer.max_try_make_batch=0", ["trainer.max_try_make_batch = 0", "or -1"]),
        ("trainer.max_skipped_updates=0", ["trainer.max_skipped_updates = 0", "or -1"]),
        ("data.mini_rollout_batch_size=3", ["data.mini_rollout_batch_size = 3", "online_filtering=true"]),
        ("algorithm.gamma=1.5", ["algorithm.gamma = 1.5", "from 0 to 1"]),
        ("worker.actor.clip_ratio_dual=1", ["worker.actor.clip_ratio_dual = 1", "above 1"]),
        ("data.min_pixels=5000000", ["data.min_pixels = 5000000", "data.max_pixels = 4194304"]),
        ("trainer.experiment_name=../x", ["trainer.experiment_name = '../x'", "leaves the runs' folder"]),
        ("trainer.experiment_name=a/../../x", ["trainer.experiment_name"]),
        ("trainer.project_name=..", ["trainer.project_name = '..'"]),
        ("trainer.project_name=/x", ["trainer.project_name = '/x'"]),
        ("trainer.project_name=~", ["trainer.project_name", "leaves"]),
        ("trainer.load_checkpoint_path=runs/step_5", ["load_checkpoint_path", "global_step_N"]),
        ("trainer.load_checkpoint_path=runs/global_step_5", ["load_checkpoint_path", "no such folder"]),
        ("data.format_prompt=answer.jinja", ["data.format_prompt", "no such file"]),
        ("data.val_files=''", ["data.val_files", "correct it"]),
        ("data.val_files=verl/typo", ["data.val_files", "correct it"]),
        ("worker.actor.model.model_path=./missing", ["model_path", "correct it"]),
        ("worker.actor.model.model_path=verl", ["model_path", "config.json"]),
        ("worker.reward.reward_function=rewards.txt", ["reward_function", "FILE.py:NAME"]),
        ("worker.reward.reward_function=no_such.py:score", ["reward_function", "no_such.py"]),
    ],
)
def test_a_fault_names_the_key_the_limit_and_the_knob(argument, words):
    faults = faults_of(argument)
    fault = next(fault for fault in faults if words[0] in fault)
    assert all(word in fault for word in words), fault


def test_all_faults_are_reported_together_and_none_follows_from_another():
    faults = faults_of(
        "data.rollout_batch_size=x",
        "data.sed=1",
        "worker.rollout.n=1",
        "trainer.nnodes=0",
        "algorithm.gamma=2",
    )
    assert [fault.split(" = ")[0] for fault in faults] == [
        "data.rollout_batch_size",
        "data.sed",
        "algorithm.gamma",
        "trainer.nnodes",
        "worker.rollout.n",
    ]


def test_ranks_must_share_batches_evenly():
    faults = faults_of("trainer.n_gpus_per_node=3")
    assert [fault.split(" = ")[0] for fault in faults] == ["data.rollout_batch_size", "worker.actor.global_batch_size"]
    assert all("trainer.n_gpus_per_node = 3" in fault for fault in faults)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["algorithm.adv_estimator=rloo", "worker.rollout.n=1"], ["rloo", "got a group of 1; raise worker.rollout.n"]),
        (["algorithm.adv_estimator=grpo_passk", "worker.rollout.n=1"], ["grpo_passk", "raise worker.rollout.n"]),
        (["algorithm.kl_type=adaptive", "algorithm.kl_horizon=0"], ["algorithm.kl_horizon = 0.0", "above 0"]),
        (["algorithm.kl_type=adaptive", "algorithm.kl_target=0"], ["algorithm.kl_target = 0.0", "above 0"]),
        (
            ["algorithm.online_filtering=true", "algorithm.filter_low=0.5", "algorithm.filter_high=0.5"],
            ["algorithm.filter_low = 0.5", "no group is ever kept"],
        ),
        (
            ["algorithm.adv_estimator=gae", "worker.critic.global_batch_size=6"],
            ["data.rollout_batch_size = 8", "worker.critic.global_batch_size = 6"],
        ),
        (
            [
                "algorithm.adv_estimator=gae",
                "worker.critic.global_batch_size=4",
                "worker.critic.model.model_path=verl",
            ],
            ["worker.critic.model.model_path = ", "no config.json"],
        ),
    ],
)
def test_choices_that_do_not_fit_together(arguments, words):
    (fault,) = faults_of(*arguments)
    assert all(word in fault for word in words), fault


def test_what_an_unused_choice_needs_is_not_asked_for():
    load_config([*SMALL, "algorithm.kl_horizon=0", "algorithm.filter_low=1", "worker.critic.global_batch_size=3"])
    load_config([*SMALL, "algorithm.adv_estimator=remax", "worker.rollout.n=1", "algorithm.use_kl_loss=false"])
    load_config([*SMALL, "algorithm.online_filtering=true", "data.mini_rollout_batch_size=3"])


def test_the_reward_must_be_one_of_those_offered_unless_a_file_gives_it(tmp_path):
    assert "r1v, math" in faults_of("worker.reward.score_function=r1", score_functions=("r1v", "math"))[0]
    file = tmp_path / "own.py"
    file.write_text("def score(inputs):\n    return [{'overall': 0.0} for _ in inputs]\n")
    arguments = [*SMALL, "worker.reward.score_function=r1", f"worker.reward.reward_function={file}:score"]
    assert load_config(arguments, score_functions=("r1v",)).worker.reward.reward_function == f"{file}:score"


def test_keys_of_older_releases_are_taken_with_one_notice(caplog):
    config = load_config([*SMALL, "trainer.total_episodes=3", "worker.actor.optim.warmup_style=cosine"])
    assert config.trainer.total_epochs == 3 and config.worker.actor.optim.lr_scheduler_type == "cosine"
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "trainer.total_episodes",
        "worker.actor.optim.warmup_style",
    ]
    assert "drop trainer.total_episodes" in faults_of("trainer.total_episodes=3", "trainer.total_epochs=4")[0]


def test_existing_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    config = load_config(
        [*SMALL, "data.train_files=rows@train", "data.val_files=rows", "trainer.save_checkpoint_path=out"]
    )
    assert config.data.train_files == f"{tmp_path}/rows@train" and config.data.val_files == f"{tmp_path}/rows"
    assert config.trainer.save_checkpoint_path == f"{tmp_path}/out"
    assert config.worker.actor.model.model_path == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_the_configuration_is_frozen_travels_and_prints():
    config = load_config(SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.seed = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(config)) == config
    plain = json.loads(json.dumps(config_to_dict(config)))
    assert plain["worker"]["actor"]["optim"]["betas"] == [0.9, 0.999]
    assert config_to_dict(config.trainer)["logger"] == ["console", "file", "tensorboard"]
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert error.faults == ["a", "b"] and "2 faults" in str(error)


def test_a_record_made_in_code_takes_no_other_values():
    with pytest.raises(ValueError, match="n_gpus_per_node"):
        dataclasses.replace(Config().trainer, n_gpus_per_node=0)


KEYS = find_keys()
# Limits of a key -> a value just outside of each, and one at the limit or just inside.
OUTSIDE_AND_INSIDE = {
    "at least 1": (["0", "-1"], "1"),
    "at least 2": (["1", "0"], "2"),
    "at least 0": (["-1"], "0"),
    "above 0": (["0", "-0.1"], "0.001"),
    "above 0 (training log-probs are divided by it)": (["0", "-0.1"], "0.001"),
    "above 1": (["1"], "1.001"),
    "above 0 and at most 1": (["0", "1.001"], "1"),
    "at least 0 and below 1": (["[-0.1, 0.9]", "[0.9, 1]"], "[0, 0.999]"),
    "from 0 to 1": (["-0.001", "1.001"], "0"),
}


def limits_of(key: str) -> str:
    return (KEYS[key].kind.item or KEYS[key].kind).limits


@pytest.mark.parametrize("key", [key for key in KEYS if limits_of(key)])
def test_a_bounded_key_takes_its_limit_and_nothing_beyond_it(key):
    outside, inside = OUTSIDE_AND_INSIDE[limits_of(key)]
    outside = ["0", "-2"] if KEYS[key].kind.other == "-1" else outside
    must = "each must be" if KEYS[key].kind.item else "must be"
    for value in outside:
        (fault,) = faults_of(f"{key}={value}")
        assert fault.startswith(f"{key} = {value}: {must} {limits_of(key)}")
        assert not KEYS[key].kind.other or fault.endswith(f", or {KEYS[key].kind.other}")
    for value in [inside, KEYS[key].kind.other]:
        try:
            load_config([*SMALL, *([f"{key}={value}"] if value else [])])
        except ConfigError as error:  # what does not fit to other keys
            assert not any(limits_of(key) in fault and fault.startswith(f"{key} =") for fault in error.faults)


def test_every_number_is_bounded_that_has_no_meaning_beyond():
    assert [key for key, value in KEYS.items() if "number" in str(value.kind) and not limits_of(key)] == [
        "algorithm.kl_target",
        "algorithm.kl_horizon",
        "algorithm.filter_low",
        "algorithm.filter_high",
        "worker.reward.missing_score",
        "trainer.val_freq",
        "trainer.save_freq",
        "trainer.save_limit",
    ]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("data.seed='5'", "must be a whole number"),
        ("data.seed=5.0", "must be a whole number"),
        ("data.seed=true", "must be a whole number"),
        ("trainer.max_steps='5'", "must be a whole number, or null"),
        ("data.val_batch_size=all", "must be a whole number, or -1"),
        ("worker.actor.optim.lr='1e-6'", "must be a number"),
        ("worker.actor.optim.lr=false", "must be a number"),
        ("worker.actor.optim.lr=.nan", "must be finite"),
        ("worker.actor.optim.betas=[0.9,.inf]", "each must be finite"),
        ("worker.actor.optim.betas=[0.9,x]", "each must be a number"),
        ("worker.actor.optim.betas=[0.9,0.9,0.9]", "must be a list of 2 values"),
        ("worker.actor.optim.betas=null", "must be a list of 2 values"),
        ("data.shuffle=1", "must be true or false"),
        ("data.shuffle='true'", "must be true or false"),
        ("data.image_dir=5", "there is no such folder"),
        ("worker.rollout.val_override_config=[n]", "must be a dictionary"),
        ("worker.rollout.dtype=int8", "must be one of bf16, fp16, fp32"),
        ("worker.actor.fsdp.torch_dtype=[fp32]", "must be one of bf16, fp32"),
        ("worker.actor.fsdp.torch_dtype=16", "must be one of bf16, fp32"),
        ("worker.actor.model=null", "is a section; set its keys, such as worker.actor.model.trust_remote_code"),
        ("worker.rollout={n: 4, m: 4}", "unknown key; did you mean worker.rollout.n?"),
        ("rollout=1", "unknown key; did you mean"),
    ],
)
def test_a_value_of_another_type_is_refused_in_our_words(argument, reason):
    (fault,) = faults_of(argument)
    assert reason in fault and "pydantic" not in fault


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("float16", "fp16"), ("bfloat16", "bf16"), ("16", "fp16"), ("32", "fp32"), ("'32'", "fp32"), ("null", "fp32")],
)
def test_types_of_numbers_may_be_spelt_as_torch_does(value, dtype):
    assert load_config([*SMALL, f"worker.rollout.dtype={value}"]).worker.rollout.dtype == dtype


def test_faults_of_six_kinds_come_together(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {seed: one, sed: 1, image_dir: no/folder}\nworker: {actor: {kl_coef: 0.1}}\nn: 3\n")
    faults = faults_of(f"config={file}", "algorithm=grpo", "trainer.nnodes=0", "worker.rollout.n=1")
    reasons = [
        "worker.actor.kl_coef = 0.1: follows from algorithm.kl_coef",
        "data.seed = 'one': must be a whole number",
        "data.sed = 1: unknown key; did you mean data.seed?",
        "algorithm = 'grpo': is a section",
        "trainer.nnodes = 0: must be at least 1",
        "n = 3: unknown key; did you mean worker.rollout.n?",
        "worker.rollout.n = 1: grpo compares responses of one prompt, got a group of 1",
        "data.image_dir = 'no/folder': there is no such folder",
    ]
    assert len(faults) == len(reasons)
    assert all(fault.startswith(reason) for fault, reason in zip(faults, reasons, strict=True)), faults


def test_a_record_made_in_code_takes_no_other_keys_or_types():
    for values in ({"sed": 1}, {"seed": "1"}, {"seed": True}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match=next(iter(values))):
            DataConfig(**values)


def test_import_of_the_configuration_is_light():
    program = "import sys, verl.config.records, verl.config.loading; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not {"torch", "ray", "transformers", "vllm", "numpy", "omegaconf"} & set(loaded.stdout.split())


def test_choices_are_the_names_of_a_table_and_a_missing_table_is_named():
    assert read_names("divergences", "KL_ESTIMATORS")[:2] == ("kl", "abs")
    with pytest.raises(LookupError, match="verl/algos/losses.py has no table LOSSES"):
        read_names("losses", "LOSSES")


@pytest.mark.parametrize(
    "text",
    [
        "run #2 of 3",
        "2025_01_01",
        "12",
        "1e5",
        "true",
        "yes",
        "[a, b]",
        "{a: b}",
        "a: b",
        "x, y",
        "- z",
        "&a",
        "@x",
        "%y",
        "$z",
    ],
)
def test_text_on_the_command_line_stays_as_it_stands(text):
    assert load_config([f"trainer.experiment_name={text}"]).trainer.experiment_name == text
    assert load_config([f"trainer.experiment_name='{text}'"]).trainer.experiment_name == text
    assert load_config([f'trainer.experiment_name="{text}"']).trainer.experiment_name == text


def test_a_prompt_on_the_command_line_is_no_dictionary():
    prompt = "Answer: yes or no # in one word"
    assert load_config([f"data.format_prompt={prompt}"]).data.format_prompt == prompt
    assert load_config(["data.format_prompt=null"]).data.format_prompt is None


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("{}")
    settings = ["data.train_files=~/rows.jsonl@train", "trainer.save_checkpoint_path=~/runs/{experiment_name}"]
    config = load_config([*settings, "trainer.experiment_name=a"])
    assert config.data.train_files == f"{tmp_path}/rows.jsonl@train"
    assert config.trainer.save_checkpoint_path == f"{tmp_path}/runs/a"


def test_a_null_folder_for_checkpoints_is_the_default(tmp_path):
    file = tmp_path / "upstream.yaml"
    file.write_text("trainer:\n  save_checkpoint_path: null\n")
    for given in ([f"config={file}"], ["trainer.save_checkpoint_path=null"]):
        assert load_config(given).trainer.save_checkpoint_path == load_config([]).trainer.save_checkpoint_path
    other = tmp_path / "mine.yaml"
    other.write_text("trainer: {save_checkpoint_path: there}\n")
    assert load_config([f"config={other}"]).trainer.save_checkpoint_path.endswith("/there")


@pytest.mark.parametrize(
    "argument",
    ["trainer.seed=010", "trainer.save_freq=0x10", "trainer.max_steps=1:30", "worker.actor.optim.lr=1:30.5"],
)
def test_a_number_is_written_in_decimals(argument):
    (fault,) = faults_of(argument)
    key, _, text = argument.partition("=")
    assert fault.startswith(f"{key} = {text!r}: must be a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"data:\n  prompt_key: caf\xe9\n", "is not UTF-8"),
        (b"\xff\xfed\x00", "is not UTF-8"),
        (b"data:\n  prompt_key: a\n  format_prompt: Answer: yes or no\n", "line 3"),
        (b"trainer:\n  seed: ${nothing}\n", "nothing"),
        (b"actor_rollout_ref: {model: {path: x}}\ndata: {train_batch_size: 8}\n", "verl's own trainer"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_fault(tmp_path, content, words):
    (tmp_path / "run.yaml").write_bytes(content)
    (fault,) = faults_of(f"config={tmp_path / 'run.yaml'}")
    assert words in fault and ("run.yaml" in fault or "actor_rollout_ref" in fault)


def test_a_section_that_is_none_is_a_fault_beside_epochs(tmp_path):
    (tmp_path / "run.yaml").write_text("trainer: 5\n")
    with pytest.raises(ConfigError, match="trainer = 5: is a section"):
        load_config([f"config={tmp_path / 'run.yaml'}"])


@pytest.mark.parametrize(
    ("content", "override", "fault"),
    [
        ("trainer: 5", "trainer.seed=3", "trainer = 5: is a section"),
        ("data:", "data.seed=3", "data = None: is a section"),
        ("worker: {actor: {optim: [1]}}", "worker.actor.optim.lr=1e-6", "worker.actor.optim = [1]: is a section"),
        (
            "worker: {rollout: {val_override_config: 3}}",
            "worker.rollout.val_override_config.n=2",
            "worker.rollout.val_override_config = 3: must be a dictionary",
        ),
    ],
)
def test_the_command_line_covers_no_section_of_a_file_that_is_none(tmp_path, content, override, fault):
    (tmp_path / "run.yaml").write_text(content)
    assert [text for text in faults_of(f"config={tmp_path / 'run.yaml'}", override) if text.startswith(fault)]


@pytest.mark.parametrize(
    "argument", ["trainer.experiment_name=caf\udce9", "data.image_dir=/\udcff", "config=\udcff.yaml", "data.\udcff=1"]
)
def test_bytes_that_are_no_text_are_one_fault(argument):
    (fault,) = faults_of(argument)
    assert "is not UTF-8" in fault and repr(argument.partition("=")[2]) in fault


def test_a_chat_template_in_another_encoding_is_named(tmp_path):
    (tmp_path / "chat.jinja").write_bytes(b"caf\xe9")
    assert any(
        "override_chat_template" in fault for fault in faults_of(f"data.override_chat_template={tmp_path}/chat.jinja")
    )
