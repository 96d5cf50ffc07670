"""Help of the trainer and the page of its keys, both read from the fields of the configuration."""

import subprocess
import sys
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS
from verl.config import docs as config_docs
from verl.config.fields import find_keys, find_sections
from verl.config.old_keys import DERIVED_KEYS, RENAMED_KEYS, SETTLED_KEYS
from verl.trainer.main import USER_ERROR, main

ROOT = Path(__file__).resolve().parents[2]
KEYS = find_keys()


def test_every_key_has_a_line_that_explains_it():
    openings = ("Whether", "What", "Which", "How", "Where")
    for key in KEYS.values():
        assert key.meaning.endswith(".") and "\n" not in key.meaning, key.name
        assert not key.meaning.startswith(openings), key.name


def test_the_page_is_what_the_command_writes():
    assert config_docs.PAGE.read_text() == config_docs.render_page(), "run python3 -m verl.config.docs --write"


def test_the_page_has_a_row_for_every_key_of_today_and_before():
    page = config_docs.render_page()
    for key in [*KEYS, *RENAMED_KEYS, *SETTLED_KEYS, *DERIVED_KEYS]:
        assert page.count(f"| `{key}` |") >= 1, key


@pytest.mark.parametrize("arguments", [["--help"], ["config=no.yaml", "data.seed=x", "-h"]], ids=" ".join)
def test_help_lists_every_key_with_type_default_and_meaning(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Usage: ")
    assert all(word in printed for word in ("config=FILE", "key=value", "trainer.dry_run=true", "--list"))
    assert [line for line in printed.splitlines() if line in find_sections(KEYS)] == [
        section for section in find_sections(KEYS) if any(key.section == section for key in KEYS.values())
    ]
    for key in KEYS.values():
        assert f"\n  {key.name} = " in printed and f"({key.kind})\n      {key.meaning}\n" in printed


def test_help_of_a_section_has_its_sections_too(capsys):
    assert main(["--help", "worker.ref"]) == 0
    assert capsys.readouterr().out == (
        "worker.ref.fsdp\n"
        "  worker.ref.fsdp.enable_cpu_offload = false   (true or false)\n"
        "      CPU offload of the reference's parameters; a layer is on its GPU while it computes.\n"
        "  worker.ref.fsdp.mp_param_dtype = null   (one of bf16, fp32, or null)\n"
        "      Type in which the reference computes, which must be the actor's; null is that.\n"
        "\n"
        "worker.ref.offload\n"
        "  worker.ref.offload.offload_params = false   (true or false)\n"
        "      CPU offload of the reference's parameters between passes.\n"
    )


def test_help_of_one_key_has_no_other(capsys):
    assert main(["worker.rollout.n", "--help"]) == 0
    assert capsys.readouterr().out == (
        "worker.rollout\n"
        "  worker.rollout.n = 8   (whole number, at least 1)\n"
        "      Responses per prompt: the size of a group.\n"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("worker.rolout", "is no section or key; did you mean worker.rollout?"),
        ("rollout", "is no section or key; did you mean worker.rollout?"),
        ("gamma", "is no section or key; did you mean algorithm.gamma?"),
        ("trainer.total_episodes", "is now called trainer.total_epochs"),
        ("worker.hybrid_engine", "is not needed: actor and engine always share their devices"),
        ("worker.rollout.prompt_length", "follows from data.max_prompt_length; set that instead"),
    ],
)
def test_help_of_a_wrong_name_names_the_right_one(name, reason, capsys):
    assert main(["--help", name]) == USER_ERROR
    printed = capsys.readouterr()
    assert printed.err == f"{name} {reason}\n" and not printed.out


def test_the_list_has_recipes_rewards_and_choices(capsys):
    assert main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first_words = {line[0]: " ".join(line[1:]) for line in lines if line}
    assert "(configs/spatialthinker_7b.yaml)" in first_words["scripts/spatialthinker_7b_grpo.sh"]
    assert "scripts/setup.sh" not in first_words and "scripts/qwen_2_5_3b_stvqa_sft.sh" in first_words
    assert REWARDS.keys() <= first_words.keys()
    assert all(first_words[name] in str(function.__doc__) for name, function in REWARDS.items())
    assert first_words["algorithm.adv_estimator"].startswith("grpo, grpo_passk")
    assert first_words["worker.actor.loss_type"] == "default, gspo, gspo_token, cispo, sapo"
    assert first_words["trainer.logger"].endswith("mlflow, swanlab")


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_imports_nothing_heavy(option):
    program = f"import sys; from verl.trainer.main import main; main([{option!r}]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not {"torch", "ray", "transformers", "vllm", "scipy"} & set(loaded.stdout.splitlines()[-1].split())


def test_the_command_prints_the_page():
    command = [sys.executable, "-m", "verl.config.docs"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert printed == config_docs.PAGE.read_text()
