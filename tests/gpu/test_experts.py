"""On a GPU: grouped products in bf16 against a loop in float32, and an engine's experts replayed by the actor."""

import pytest
import torch

from tests.support.gpus import ON_GPU, relative
from tests.support.tiny_model_folder import save_tiny_model
from tests.support.training import make_data

pytestmark = pytest.mark.gpu
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 16, 4, 256, 128, 1000


class Experts(torch.nn.Module):
    """Stacked experts with random weights; the last is never chosen."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = torch.nn.Parameter((torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN) / 16).to("cuda", dtype))
        self.down_proj = torch.nn.Parameter((torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / 11).to("cuda", dtype))
        self.act_fn = torch.nn.functional.silu


def test_grouped_products_equal_the_loop_in_value_and_gradient():
    from verl.model.experts import mix_experts

    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.rand(TOKENS, TOP_K, generator=generator).softmax(-1)
    chosen = torch.rand(TOKENS, NUM_EXPERTS - 1, generator=generator).topk(TOP_K).indices.cuda()
    upstream = torch.randn(TOKENS, HIDDEN, generator=generator).cuda()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        module, inputs = Experts(dtype), [part.to("cuda", dtype).requires_grad_() for part in (states, weights)]
        out = mix_experts(inputs[0], inputs[1], chosen, module)
        wanted = [*inputs, module.gate_up_proj, module.down_proj]
        found.append([out.detach(), *torch.autograd.grad(out, wanted, upstream.to(dtype))])
    for exact, fast in zip(*found, strict=True):
        assert relative(fast, exact) < 2e-2


def test_adapters_side_by_side_as_peft_lays_them_equal_the_loop():
    from types import SimpleNamespace

    from verl.model.experts import _adapter_output

    generator = torch.Generator().manual_seed(2)
    a = torch.randn(NUM_EXPERTS, 8, HIDDEN, generator=generator)
    b = torch.randn(WIDTH, 8, NUM_EXPERTS, generator=generator).permute(2, 0, 1)
    rows, ends = torch.randn(TOKENS, HIDDEN, generator=generator), torch.arange(1, NUM_EXPERTS + 1) * TOKENS
    ends = (ends // NUM_EXPERTS).int().cuda()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = b.cuda().to(dtype), a.to("cuda", dtype), 0.5
        wrapper = SimpleNamespace(get_delta_factors=lambda _, parts=parts: parts, active_adapters=["default"])
        found.append(_adapter_output(wrapper, rows.to("cuda", dtype), ends))
    assert relative(found[1], found[0]) < 2e-2


def test_passes_never_wait_for_the_gpu():
    from verl.model.experts import choose_experts, mix_experts

    module, states = Experts(torch.bfloat16), torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16().requires_grad_()

    def run() -> None:
        logits = states[:, :NUM_EXPERTS]
        weights, chosen = choose_experts(logits, TOP_K)
        mix_experts(states, weights, chosen, module).sum().backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_actor_follows_the_engine_into_its_experts(tmp_path):
    """In bf16 after a weight sync: with replay the actor's log-probs come closer to the engine's than without."""
    from tests.support.engines import sample, wake, workers

    make_data(tmp_path / "rows", num_train=16, num_val=16)
    folder = save_tiny_model(tmp_path / "model", family="qwen3_vl_moe")
    chosen = [f"worker.actor.model.model_path={folder}", "worker.actor.routing_replay=true"]
    chosen += ["data.max_prompt_length=2048", "data.max_response_length=48", "worker.rollout.enforce_eager=true"]
    chosen += ["worker.rollout.max_num_batched_tokens=4096"]
    chosen += ["worker.actor.fsdp.torch_dtype=bf16", "worker.actor.fsdp.mp_param_dtype=bf16"]
    with workers(tmp_path / "rows", *ON_GPU, *chosen) as (actor, rollout, prompts, _):
        wake(actor, rollout)
        groups = sample(rollout, prompts, experts=True)
        rollout.sleep()
        experts = torch.cat([*groups.non_tensor_batch["experts"]])
        assert len(experts[:, 0].unique()) == len(experts[:, 2].unique()) == 8
        gaps = {}
        for columns in (["images", "experts"], ["images"]):
            actor.load_groups(groups.select(None, columns))
            own = actor.compute_log_probs(groups.select(["response_mask"], [])).batch["old_log_probs"]
            gap = (own - groups.batch["rollout_log_probs"]).abs()[groups.batch["response_mask"].bool()]
            gaps[len(columns)] = (float(gap.mean()), float(gap.max()))
        print(f"mean and largest gap with replay {gaps[2]}, without {gaps[1]}")
        assert gaps[2][0] < 0.01
        assert gaps[2][0] <= gaps[1][0]
