"""The toy model over several ranks that talk over gloo is the one over one rank."""

import pytest

from tests.support.updates import check_checkpoints, check_passes

pytestmark = pytest.mark.integration
MORE = pytest.mark.nightly


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=MORE)])
def test_log_probs_and_gradients_are_those_of_one_rank(tmp_path, num_ranks):
    check_passes(tmp_path, num_ranks, "cpu")


@pytest.mark.parametrize("counts", [(2, 1, 2), pytest.param((4, 2, 1, 4), marks=MORE)])
def test_checkpoints_are_the_same_for_any_number_of_ranks(tmp_path, counts):
    check_checkpoints(tmp_path, counts, "cpu")


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_5_moe", marks=MORE)])
def test_checkpoints_of_linear_attention_go_on_with_another_number_of_ranks(tmp_path, family):
    check_checkpoints(tmp_path, (2, 1), "cpu", family)
