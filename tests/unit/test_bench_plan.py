"""The plan for several machines: the measured tables again, terms worked by hand, and what grows first."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from verl.bench.plan import describe_growth, list_machines, main, plan_model
from verl.bench.step_time import GPUS, MODELS, Cluster, group_by_cause, least_gpus, step_time

DOCS = Path(__file__).parents[2] / "docs"
SPEED, SEVERAL = DOCS / "speed.md", DOCS / "several_machines.md"
THREE = MODELS["3B"]
BIG = ("rollout", "old log-probs", "reference log-probs", "update")


def measured(heading: str, column: int) -> dict[str, float]:
    """Seconds by phase of a table of the page; sums such as 0.79 + 0.21 are added up."""
    section = SPEED.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    seconds = {}
    for cells in rows[2:]:
        name = re.sub("weight sync.*", "weight sync", cells[0].partition(",")[0])
        seconds[name] = sum(map(float, cells[column].split("+")))
    return seconds


@pytest.mark.parametrize(
    ("heading", "column", "gpu", "gpus", "groups", "old"),
    [
        ("Four GPUs", 1, "H200", 1, 64, 1.0),
        ("Four GPUs", 2, "H200", 4, 64, 1.0),
    ],
)
def test_the_measured_tables_come_out_again_within_a_tenth(heading, column, gpu, gpus, groups, old):
    """But for the phase of images, 1.84 s on one H200 and 0.36 s on four, whose processors were busy with others."""
    table = measured(heading, column)
    time = step_time(THREE, Cluster(1, gpus, GPUS[gpu]), groups, old)
    estimated = time.phases | {"whole step": time.total}
    for name in (*BIG, "weight sync", "whole step"):
        assert estimated[name] == pytest.approx(table[name], rel=0.1), name


def test_the_table_of_machines_on_the_page_is_what_the_command_prints():
    for name, model in MODELS.items():
        row = re.search(rf"^\| {name} \|(.*)\|$", SEVERAL.read_text(), re.MULTILINE)
        assert row is not None
        steps = [f"{step_time(model, Cluster(2**power, 8)).total:.0f}" for power in range(7)]
        assert [cell.strip() for cell in row[1].split("|")] == steps


def test_two_machines_gather_over_the_network_what_one_does_not():
    """7.5 GB, half of which is there, at 1 GB/s: 3.75 s a pass, 38 units of 0; 16 passes, thrice in the update."""
    slow = Cluster(2, 8, network=1e9, network_share=1.0, hop_s=0.0)
    alone, time = step_time(THREE, replace(slow, machines=1)), step_time(THREE, slow)
    assert group_by_cause(alone)["all-gather"] == 0
    assert time.phases["reference log-probs"] == pytest.approx(16 * 3.75)
    assert time.phases["old log-probs"] == pytest.approx(0.75 * 16 * 3.75)
    assert time.phases["update"] == pytest.approx(3 * 16 * 3.75)


def test_handles_for_the_engines_grow_with_the_gpus():
    """824 tensors of 512 GPUs at 14 us, beside what a sync of 1 GPU and gathering take."""
    free = {"network": 1e15, "hop_s": 0.0}
    added = {m: group_by_cause(step_time(THREE, Cluster(m, 8, **free)))["weight sync"] for m in (32, 64)}
    handles = 824 * 512 * 14e-6
    assert added[64] - added[32] == pytest.approx(handles / 2, rel=1e-3)


def test_a_checkpoint_is_waited_for_when_it_takes_longer_than_the_steps_between():
    """30 GB written and read at 0.1 GB/s: 600 s, every 5 steps: a step of 120 s at least."""
    time = step_time(THREE, Cluster(1, 8, storage=1e8))
    assert time.total == pytest.approx(120) and group_by_cause(time)["checkpoint"] > 50
    assert step_time(THREE, Cluster(1, 8)).phases["checkpoint"] == 0


def test_a_model_that_does_not_fit_is_said_with_the_gpus_it_needs():
    """12 bytes of 31.1e9 parameters over 8 GPUs are 46.7 GB, below 60; over 4 they are 93.3."""
    assert least_gpus(MODELS["30B-A3B"], GPUS["H100"]) == 8
    lines = "\n".join(plan_model("30B-A3B", MODELS["30B-A3B"], [Cluster(1, 4), Cluster(2, 4)], None))
    assert "1  does not fit: needs 8 GPUs" in lines and "2  does not fit" not in lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "grows first: driver"),
        ({"network": 1e9}, "grows first: all-gather"),
        ({"storage": 1e7}, "nothing grows by 5% of a step; on 64 machines most is added by driver"),
    ],
)
def test_what_grows_first_is_named(options, words):
    times = {cluster: step_time(THREE, cluster) for cluster in (Cluster(m, 8, **options) for m in (1, 8, 64))}
    assert words in describe_growth(times)


def test_the_command_prints_every_model_and_what_it_assumes(capsys):
    assert main(["--nodes", "3", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert list_machines(3) == [1, 2, 3]
    assert [f"{name}: seconds of a step" in out for name in MODELS] == [True] * 3
    for words in ("Measured on one and four GPUs", "Assumed:", "400 GB/s a machine", "2 GB/s for all machines"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], "whole number"),
        (["--network", "fast"], "need GB/s above 0"),
        (["--nodes", "64", "--prompts", "100"], "fewer than the 512 GPUs"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and words in capsys.readouterr().err
