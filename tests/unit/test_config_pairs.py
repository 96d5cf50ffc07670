"""Values that depend on one another: optimizer and type of weights, divergence and loss."""

import pytest

from verl.config.loading import load_config


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize(
    ("file", "command_line", "dtype"),
    [
        ("{optim: {strategy: adamw}}", [], "fp32"),
        ("{optim: {strategy: adamw}, fsdp: {torch_dtype: null}}", [], "fp32"),
        ("{optim: {strategy: adamw}, fsdp: {enable_cpu_offload: true}}", [], "fp32"),
        ("{optim: {strategy: adamw}, fsdp: {torch_dtype: bf16}}", [], "bf16"),
        ("{fsdp: {torch_dtype: bf16}}", ["optim.strategy=adamw"], "bf16"),
        ("{optim: {strategy: adamw}}", ["fsdp.torch_dtype=bf16"], "bf16"),
        ("{optim: {strategy: adamw}}", ["optim.strategy=adamw_bf16"], "bf16"),
        ("{optim: {strategy: adamw_bf16}}", ["optim.strategy=adamw"], "fp32"),
        ("{optim: {lr: 1.0e-6}}", [], "bf16"),
    ],
)
def test_adamw_keeps_weights_in_float32_unless_a_type_is_given(tmp_path, caplog, role, file, command_line, dtype):
    path = tmp_path / "run.yaml"
    path.write_text(f"worker: {{{role}: {file}}}\nalgorithm: {{adv_estimator: gae}}\n")
    overrides = [f"worker.{role}.{argument}" for argument in command_line]
    worker = load_config([f"config={path}", *overrides]).worker
    other = worker.critic if role == "actor" else worker.actor
    assert getattr(worker, role).fsdp.torch_dtype == dtype and other.fsdp.torch_dtype == "bf16"
    said = [record.getMessage() for record in caplog.records]
    strategy = getattr(worker, role).optim.strategy
    is_pair = (strategy, dtype) in (("adamw", "fp32"), ("adamw_bf16", "bf16"))
    assert len([text for text in said if "lose every update" in text and role in text]) == (not is_pair)
    is_given = "torch_dtype" in file + "".join(command_line)
    assert (f"worker.{role}.fsdp.torch_dtype = fp32, since" in " ".join(said)) == (dtype == "fp32" and not is_given)


def test_the_other_pairs_of_optimizer_and_type_are_said(caplog):
    load_config(["worker.actor.fsdp.torch_dtype=fp32"])
    assert "trained by adamw, with states in float32" in caplog.records[-1].getMessage()
    caplog.clear()
    load_config(["worker.critic.optim.strategy=adamw", "worker.critic.fsdp.torch_dtype=bf16"])
    assert not caplog.records  # there is no critic


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        (["algorithm.kl_penalty=kl"], True),
        (["algorithm.kl_penalty=kl", "algorithm.adv_estimator=rloo"], True),
        (["algorithm.kl_penalty=kl", "algorithm.kl_type=adaptive"], True),
        (["algorithm.kl_penalty=kl", "algorithm.use_kl_loss=false"], False),
        (["algorithm.kl_penalty=kl", "algorithm.kl_coef=0"], False),
        (["algorithm.kl_penalty=kl", "algorithm.disable_kl=true"], False),
        (["algorithm.kl_penalty=low_var_kl"], False),
        (["algorithm.kl_penalty=mse"], False),
    ],
)
def test_a_divergence_without_a_gradient_is_said(caplog, arguments, is_said):
    load_config([*arguments])
    assert ("zero on average" in " ".join(record.getMessage() for record in caplog.records)) == is_said
