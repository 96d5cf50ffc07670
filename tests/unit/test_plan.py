"""Plans and probes: hand-worked figures, limits, and passes that no device has to run."""

import math
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.unit.test_memory_estimate import DATA, MODEL
from verl.bench.random_models import describe_random_model
from verl.config.auto import ENGINE, EXPERIENCE, KEPT, UPDATE, WITHOUT_GPU, with_values
from verl.config.loading import load_config
from verl.config.records import Config, ConfigError
from verl.config.values import AUTO
from verl.data.dataset import Prompt
from verl.trainer.model_checks import measure_checked_model
from verl.trainer.plan import Gpu, Plan, largest_groups, make_plan, plan_dry_run, read_gpus
from verl.workers.probe import GB, fit_passes

LOAD = ("data.max_prompt_length=1586", "data.max_response_length=400", "trainer.n_gpus_per_node=1")
SMALL_CARD = ("algorithm.disable_kl=true", "worker.actor.offload.offload_optimizer=true")


def chosen(gpu: Gpu | None, *arguments: str) -> dict[str, float]:
    config = load_config([*LOAD, "data.rollout_batch_size=128", "worker.actor.global_batch_size=32", *arguments])
    plan = make_plan(config, MODEL, DATA, gpu)
    return {key: attrgetter(key)(plan.config) for key in WITHOUT_GPU}


def test_without_a_gpu_the_released_values_are_taken():
    assert chosen(None) == WITHOUT_GPU


def test_values_that_are_given_stay():
    given = {UPDATE: 3, EXPERIENCE: 5, KEPT: 1.5, ENGINE: 0.25}
    arguments = [f"{key}={value}" for key, value in given.items()]
    assert chosen(Gpu(79.1), *arguments) == given
    plan = make_plan(load_config(arguments), MODEL, DATA, Gpu(79.1))
    assert plan.lines == [] and not plan.probes


def test_passes_have_forty_thousand_tokens_where_they_fit():
    assert chosen(Gpu(139.0))[UPDATE] == chosen(Gpu(139.0))[EXPERIENCE] == 20  # 40,000 / 1,986
    assert chosen(Gpu(139.0), "data.max_prompt_length=6144", "data.max_response_length=2048")[UPDATE] == 5


@pytest.mark.parametrize("total", [24.0, 40.0, 80.0, 139.0])
def test_a_larger_card_plans_no_smaller_passes(total: float):
    small, large = (chosen(Gpu(size), *SMALL_CARD) for size in (total, 1.5 * total))
    assert small[UPDATE] <= large[UPDATE] and small[KEPT] <= large[KEPT]
    assert small[ENGINE] * total <= large[ENGINE] * 1.5 * total + 0.2


def test_what_others_hold_of_a_card_is_not_planned():
    alone, shared, smaller = (chosen(gpu, *SMALL_CARD) for gpu in (Gpu(80), Gpu(80, 30), Gpu(50)))
    assert shared[UPDATE] == smaller[UPDATE] and shared[KEPT] == smaller[KEPT] < alone[KEPT]
    assert shared[ENGINE] * 80 == pytest.approx(smaller[ENGINE] * 50, abs=0.1)


def test_a_card_without_room_for_the_engine_is_one_error():
    with pytest.raises(
        ConfigError, match="worker.rollout.gpu_memory_utilization = auto: of the GPU's 12.0 GiB 1.0 are taken"
    ) as caught:
        chosen(Gpu(12.0, 1.0))
    assert "offloading does not make room: train with LoRA" in str(caught.value)


OFFLOADED = "worker.actor.fsdp.enable_cpu_offload"


def seven(tmp_path: Path, *arguments: str) -> Plan:
    """The dry run's plan of LoRA on a model of Qwen2.5-VL-7B's shape, without a GPU at hand."""
    folder = tmp_path / "random_qwen2_5_vl_7b"
    describe_random_model(folder)
    chosen = ["worker.actor.model.lora.rank=64", f"worker.actor.model.model_path={folder}"]
    config = load_config([*LOAD, *chosen, *arguments])
    return plan_dry_run(config, measure_checked_model(config), DATA, None, False)


def test_a_dry_run_chooses_what_lora_on_a_7b_needs_on_24_gib(tmp_path):
    """The base of 15.4 GiB beside an engine's: one of the two waits in host memory."""
    plan = seven(tmp_path, "trainer.memory_gb=24")
    assert plan.lines[0].startswith("As configured it is not estimated to fit: ")
    assert plan.lines[1:4] == ["It is with these keys:", f"  {OFFLOADED}=true", "Plan for GPUs of 24.0 GiB:"]
    assert attrgetter(OFFLOADED)(plan.config)
    assert 15.4 + 1.5 < attrgetter(ENGINE)(plan.config) * 24 < 24 - 4


def test_a_dry_run_changes_nothing_where_it_fits(tmp_path):
    plan = seven(tmp_path, "trainer.memory_gb=80")
    assert plan.lines[0] == "Plan for GPUs of 80.0 GiB:" and not attrgetter(OFFLOADED)(plan.config)


def test_a_model_that_no_offloading_makes_room_for_is_refused_with_what_would(tmp_path):
    with pytest.raises(ConfigError, match=r"offloading does not make room: .* or raise trainer.n_gpus_per_node"):
        seven(tmp_path, "trainer.memory_gb=12")


def test_a_run_without_room_names_the_keys_that_make_it():
    """Policy, reference and states of 9.3 GiB beside an engine of 3.3 on a card of 16."""
    with pytest.raises(ConfigError, match=r"the engine needs at least 3.3; set worker.actor.fsdp.enable_cpu_offload="):
        chosen(Gpu(16.0))


def test_the_plan_is_said_in_few_lines():
    lines = make_plan(load_config([*LOAD, f"{UPDATE}=2", *SMALL_CARD]), MODEL, DATA, Gpu(80.0, 3.0)).lines
    assert lines[0] == "Plan for GPUs of 80.0 GiB, 3.0 of them taken by other processes:"
    assert lines[1] == "  updates in passes of 2 x 1986 tokens (given)"
    assert lines[2] == "  log-probs in passes of 20 x 1986 tokens" and len(lines) == 5


def test_other_values_leave_the_rest_of_a_record():
    config = load_config([])
    changed = with_values(config, {UPDATE: 7, "trainer.max_steps": 3})
    assert changed.worker.actor.micro_batch_size_per_device_for_update == 7 and changed.trainer.max_steps == 3
    assert with_values(changed, {UPDATE: AUTO, "trainer.max_steps": config.trainer.max_steps}) == config
    assert isinstance(changed, Config)


def test_gpus_are_read_within_the_limit_and_beside_other_processes():
    table = "81920, 1024\n81920, 61440\n"
    assert read_gpus(table, None) == [Gpu(80.0, 1.0), Gpu(80.0, 60.0)]
    assert read_gpus(table, 40.0) == [Gpu(40.0, 0.0), Gpu(40.0, 20.0)]  # 20 of the 40 are left beside the others
    assert read_gpus("[N/A], [N/A]\n", None) == [] == read_gpus("", None)


def test_a_gpu_that_cannot_be_measured_is_said():
    (line,) = make_plan(load_config([f"{UPDATE}=2"]), MODEL, DATA, None, on_gpu=True).lines
    assert "nvidia-smi shows no GPU" in line and f"{ENGINE}=0.6" in line and UPDATE not in line
    assert make_plan(load_config([]), MODEL, DATA, None).lines == []


class Passes:
    """Peaks of passes: 10 GiB resident, bytes per token, and kept activations that take `factor` times theirs."""

    def __init__(self, per_token: float, factor: float = 1.0, ends_at: float = math.inf):
        self.per_token, self.factor, self.ends_at = per_token, factor, ends_at
        self.calls: list[tuple[int, float]] = []

    def __call__(self, tokens: int, kept: float) -> float:
        self.calls.append((tokens, kept))
        peak = 10 * GB + self.per_token * tokens + self.factor * kept
        return math.inf if peak > self.ends_at else peak

    def fit(self, tokens: int = 40_000, available_gb: float = 60.0):
        return fit_passes(self, available_gb * GB, tokens, 1_000)


def test_what_a_pass_leaves_goes_to_kept_activations():
    passes = Passes(GB / 2_000)  # 40,000 tokens take 20 GiB
    fit = passes.fit()
    assert fit.tokens == 40_000 and fit.kept == pytest.approx(0.9 * 30 * GB) and fit.peak <= 60 * GB
    assert passes.calls[-1] == (fit.tokens, fit.kept)  # what was tried last is what the actor keeps
    assert fit.notes == []


def test_activations_that_are_larger_than_estimated_are_cut_to_what_fits():
    fit = Passes(GB / 2_000, factor=2.0).fit()
    assert fit.kept == pytest.approx(0.9 * 15 * GB) and fit.peak <= 60 * GB


def test_passes_that_do_not_fit_are_halved_and_said():
    fit = Passes(GB / 500).fit()  # 40,000 tokens would take 80 GiB, 20,000 take 40
    assert fit.tokens == 20_000 and fit.notes == ["passes of 40000 tokens would not fit; they have 20000"]


def test_no_pass_is_run_that_is_foreseen_not_to_fit():
    passes = Passes(GB / 500)
    passes.fit()
    assert max(tokens for tokens, _ in passes.calls) == 20_000


def test_memory_that_runs_out_with_kept_activations_takes_fewer():
    passes = Passes(GB / 2_000, ends_at=45 * GB)
    fit = passes.fit()
    assert 0 < fit.kept <= 15 * GB and passes.calls[-1] == (fit.tokens, fit.kept)


def test_a_pass_of_one_response_that_does_not_fit_is_named():
    with pytest.raises(MemoryError, match="1000 tokens, reaches 80.0 GiB of the 60.0 .* lower data.max_prompt_length"):
        Passes(70 * GB / 1_000).fit()


class Rows:
    """Six prompts of 100 tokens and one five times longer; another has the most patches."""

    entries = [
        SimpleNamespace(length=500 if i == 4 else 100, patch_grids=[(1, 4, 40 if i == 2 else 4)]) for i in range(7)
    ]

    def readable(self, indices, spares):
        assert list(spares)[0] != 4
        return list(indices)

    def __getitem__(self, row: int) -> Prompt:
        length = self.entries[row].length
        return Prompt([1], torch.arange(length), torch.zeros(3, length), [b"png"], "question", "answer", str(row))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_prompt_five_times_longer_than_all_others_is_among_the_probed(num_ranks):
    sizes = ["data.max_prompt_length=600", "data.max_response_length=50", "worker.rollout.n=4"]
    chosen = [f"trainer.n_gpus_per_node={num_ranks}", "worker.actor.micro_batch_size_per_device_for_update=3"]
    groups = largest_groups(load_config([*sizes, *chosen]), Rows(), 0)
    uids = list(groups.non_tensor_batch["uid"])
    assert uids == ["4", "2", "4", "2", "4", "2"][: 3 * num_ranks]  # 3 x 650 tokens take three of 500 + 4 x 50
    assert groups.batch["prompt_mask"].sum(-1).tolist() == [500 if uid == "4" else 100 for uid in uids]
    assert groups.batch["response_mask"].all() and groups.batch["responses"].shape == (3 * num_ranks, 4, 50)
