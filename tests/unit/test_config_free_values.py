"""Text inside dictionaries with free keys: on the command line it stays as it stands."""

import pytest

from verl.config.loading import load_config
from verl.config.records import ConfigError

KEY = "worker.reward.reward_function_kwargs"


@pytest.mark.parametrize(
    "text",
    ["a#b", "a # b", "#", "Answer: yes or no", "2025_01_01", "2025-01-01", "12:30:45", "yes", "no", "off", "007",
     "0x1F", "1_000", "1:2", "~", "${oc.env:HOME}", "*x", "&a b", "!tag x", "| x", "- a", "% x", "@y", " a ", "",
     "[0-9]+", "{answer}", "nan", ".inf", "it's", "a=b", "'", "\\boxed{}", "x [y]", "[a] # b", "None", "1.2.3",
     "\n a: b\n"],
)  # fmt: skip
def test_text_stays_as_it_stands(text):
    config = load_config([f"{KEY}.x={text}", f"worker.actor.model.override_config.a.b={text}"])
    assert config.worker.reward.reward_function_kwargs == {"x": text}
    assert config.worker.actor.model.override_config == {"a": {"b": text}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("0", 0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-5", 1e-5),
        ("1.0e+3", 1000.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("[1, a, 2025_01_01]", [1, "a", "2025_01_01"]),
        ('{"n": 16, "note": "a # b: c", "day": 2025-01-01}', {"n": 16, "note": "a # b: c", "day": "2025-01-01"}),
        ("{}", {}),
        ("'5'", "5"),
        ('"true"', "true"),
        ('"\'"', "'"),
    ],
)
def test_numbers_lists_and_dictionaries_are_read(text, value):
    assert load_config([f"{KEY}.x={text}"]).worker.reward.reward_function_kwargs == {"x": value}


def test_a_whole_dictionary_and_single_keys_are_merged():
    argument = 'worker.rollout.val_override_config={"n":16,"top_p":0.7}'
    config = load_config([argument, "worker.rollout.val_override_config.temperature=1"])
    assert config.worker.rollout.val_override_config == {"temperature": 1, "n": 16, "top_p": 0.7}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (f"{KEY}=[1]", "must be a dictionary"),
        (f"{KEY}=a # b", "must be a dictionary"),
        (f"{KEY}.x={{a: b}}}}", "is not YAML"),
        ("worker.rollout.val_override_config.temperature=warm", "a number, at least 0"),
    ],
)
def test_what_cannot_be_read_is_a_fault_with_its_key(argument, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config([argument])
    assert argument.partition("=")[0] in caught.value.faults[0]
