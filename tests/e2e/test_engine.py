"""The engine and the trainer see the same policy: log-probs of the engine's own samples agree with the actor's."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.storage.images import load_image
from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model
from tests.support.tiny_qwen import FAMILIES, VISION_FAMILIES
from verl.config.loading import load_config
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.data.processor import load_run_processor, vision_token_ids
from verl.model.qwen_vl import ResponseLogProbs, image_patches, load_model
from verl.trainer.engine_arguments import SHARED_PREFIX, rollout_arguments
from verl.workers.actor import Actor, Groups
from verl.workers.rollout import RolloutWorker

pytestmark = pytest.mark.e2e
TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"
NUM_PROMPTS, NUM_SAMPLES, BLOCK = 6, 4, 16


def start(folder, model_path, *overrides, block_size=BLOCK):
    """Engine, rows and processor of a model; a block size of None leaves blocks to the engine."""
    for split in ("train", "val"):
        write_parquet([row for _, row in generate(NUM_PROMPTS, 11, split)], parquet_path(folder, split))
    yaml = TOY_MODEL.parent / "toy_cpu.yaml"
    config = load_config(
        [
            f"config={yaml}",
            f"worker.actor.model.model_path={model_path}",
            f"data.train_files={folder}@train",
            f"data.val_files={folder}@val",
            *overrides,
        ]
    )
    processor = load_run_processor(config)
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    text_only, longest = config.data.text_only, config.data.max_prompt_length
    data = RLHFDataset(config.data.train_files, processor, text_only=text_only, max_prompt_length=longest, **limits)
    arguments = rollout_arguments(config, "cpu", processor)
    if block_size is not None:
        arguments["engine"]["block_size"] = block_size  # as on a GPU: a CPU's blocks are longer than these prompts
    arguments["engine"]["worker_extension_cls"] = SHARED_PREFIX
    engine = RolloutWorker(rank=0, world_size=1, **arguments)
    engine.load()
    return engine, data, processor


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return start(tmp_path_factory.mktemp("data"), TOY_MODEL)


@pytest.fixture(scope="module")
def parts_with_stock_scheduler(tmp_path_factory):
    return start(tmp_path_factory.mktemp("data"), TOY_MODEL, "worker.rollout.fast_scheduler=false")


def sample(engine, prompts, seed=5, with_experts=True):
    request = prompts.select([], ["raw_prompt_ids", "images"])
    request.meta_info = {"sampling": {"n": NUM_SAMPLES, "temperature": 0.8}, "seed": seed, "log_probs": True}
    request.meta_info["experts"] = with_experts and "enable_return_routed_experts" in engine.engine_kwargs
    return engine.generate(request)


def actor_log_probs(model, prompts, samples, processor):
    whole = prompts.select().union(samples.select(["responses", "response_mask"]))
    images = [load_image(data) for row in prompts.non_tensor_batch["images"] for data in row]
    groups = Groups.from_proto(whole, *image_patches(images, processor.image_processor))
    groups.experts = [*samples.non_tensor_batch["experts"]] if "experts" in samples.non_tensor_batch else None
    scorer = ResponseLogProbs(model, vision_token_ids(processor)).train(model.training)
    return Actor(scorer, torch.device("cpu")).compute_log_probs(groups, 4096, True, 0.8)[0]


def largest_gap(engine_log_probs, expected, mask):
    return float((engine_log_probs - expected).abs()[mask.bool()].max())


@pytest.mark.parametrize(
    ("name", "scheduler"), [("parts", "SyncDecodeScheduler"), ("parts_with_stock_scheduler", "Scheduler")]
)
def test_log_probs_agree_before_and_after_new_weights(name, scheduler, request):
    engine, data, processor = request.getfixturevalue(name)
    assert type(engine.llm.llm_engine.engine_core.engine_core.scheduler).__name__ == scheduler
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    model = load_model(str(TOY_MODEL), torch.float32)
    samples = sample(engine, prompts)
    mask = samples.batch["response_mask"]
    assert mask.any(-1).all()
    expected = actor_log_probs(model, prompts, samples, processor)
    assert largest_gap(samples.batch["rollout_log_probs"], expected, mask) < 1e-3

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    engine.load_weights([(name, tensor.clone()) for name, tensor in model.state_dict().items()])
    changed = sample(engine, prompts)
    moved = actor_log_probs(model, prompts, changed, processor)
    assert largest_gap(changed.batch["rollout_log_probs"], moved, changed.batch["response_mask"]) < 1e-3
    assert (
        largest_gap(samples.batch["rollout_log_probs"], actor_log_probs(model, prompts, samples, processor), mask)
        > 0.01
    )


def test_samples_depend_on_the_seed_alone(parts):
    engine, data, processor = parts
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    first, other, again = sample(engine, prompts, 5), sample(engine, prompts, 6), sample(engine, prompts, 5)
    assert torch.equal(first.batch["responses"], again.batch["responses"])
    assert not torch.equal(first.batch["responses"], other.batch["responses"])
    assert not (first.batch["responses"] == processor.image_token_id).any()


def test_prompts_rendered_ahead_are_sampled_alike_and_hashed_once(parts, monkeypatch):
    engine, data, processor = parts
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    expected = sample(engine, prompts)
    engine.render_ahead(prompts.select([], ["raw_prompt_ids", "images"]))
    assert len(engine.rendered) == NUM_PROMPTS
    core, hashed = engine.llm.llm_engine.engine_core.engine_core, []
    known = core.request_block_hasher
    monkeypatch.setattr(core, "request_block_hasher", lambda request: hashed.append(known(request)) or hashed[-1])
    monkeypatch.setattr(engine, "_render", None)
    samples = sample(engine, prompts)
    assert not engine.rendered and len(hashed) > NUM_PROMPTS * NUM_SAMPLES
    of_prompts = hashed[: NUM_PROMPTS * NUM_SAMPLES]
    assert len({id(block) for blocks in of_prompts for block in blocks}) == sum(map(len, of_prompts)) / NUM_SAMPLES > 0
    assert torch.equal(samples.batch["responses"], expected.batch["responses"])


def test_samples_of_a_prompt_are_neighbours_and_share_its_whole_blocks(parts, monkeypatch):
    """Steps of an engine as the attention of groups sees them; a CPU's attention itself is another."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    from verl.workers.shared_prefix import split_prefixes

    engine, data, processor = parts
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    build, steps = CPUAttentionMetadataBuilder.build, []

    def watch(self, common_attn_metadata, **more):
        step = common_attn_metadata
        if step.max_query_len == 1:
            rows = slice(step.num_reqs)
            lens, starts = step.seq_lens[rows].clone(), step.query_start_loc[: step.num_reqs + 1].clone()
            steps.append((lens, split_prefixes(step.block_table_tensor[rows].clone(), lens, starts, BLOCK)))
        return build(self, common_attn_metadata=step, **more)

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", watch)
    sample(engine, prompts)
    lens, parts_of_step = steps[0]  # later ones are fewer, and a CPU's runner moves the last to where one ended
    assert len(lens) == NUM_PROMPTS * NUM_SAMPLES
    lengths = prompts.batch["prompt_mask"].sum(-1)
    whole = (lengths - 1) // BLOCK * BLOCK
    assert whole.min() > 2 * BLOCK
    assert parts_of_step.starts.diff().tolist() == [NUM_SAMPLES] * NUM_PROMPTS + [0] * (len(lens) - NUM_PROMPTS)
    assert parts_of_step.prefix_lens[:NUM_PROMPTS].tolist() == whole.tolist()
    assert torch.equal(parts_of_step.suffix_lens, (lens - whole.repeat_interleave(NUM_SAMPLES)).int())


def test_an_engine_that_cannot_read_prompts_once_names_what_it_uses_instead(parts, capsys):
    parts[0].warn_without_shared_prompt()
    said = capsys.readouterr().out
    assert "worker.rollout.shared_prompt=true has no effect" in said and "attention is CPU_ATTN" in said
    assert "every sample reads its own" in said


def test_an_engine_registers_the_attention_of_groups_before_it_chooses_one(parts):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert AttentionBackendEnum.FLASH_ATTN.get_path() == f"{SHARED_PREFIX.rpartition('.')[0]}.SharedPrefixBackend"


@pytest.mark.nightly
@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("qwen3_5")])
def test_every_familys_log_probs_are_the_engines(family, tmp_path):
    """Random weights, so that every token counts: also the ones that are never sampled would show."""
    folder = save_tiny_model(tmp_path / "model", family=family)
    sees = family in VISION_FAMILIES
    chosen = [f"data.text_only={str(not sees).lower()}", "data.max_prompt_length=2048"]
    overrides = {"text_config": {"rms_norm_eps": 0.1}} if sees else {"rms_norm_eps": 0.1}
    chosen += [f"worker.actor.model.override_config={overrides}", "worker.rollout.max_num_batched_tokens=4096"]
    engine, data, processor = start(tmp_path, folder, *chosen)
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    samples = sample(engine, prompts)
    plain, changed = (
        actor_log_probs(load_model(str(folder), torch.float32, overrides=which), prompts, samples, processor)
        for which in (None, overrides)
    )
    mask = samples.batch["response_mask"]
    assert largest_gap(plain, changed, mask) > 1e-3  # both sides read the overridden field
    gap = largest_gap(samples.batch["rollout_log_probs"], changed, mask)
    print(f"{family}: largest gap {gap:.1e}")
    assert gap < 1e-4


def test_experts_that_the_engine_chose_are_replayed(tmp_path):
    # vLLM makes its groups for experts with the first engine of a process, if that one has experts.
    process = multiprocessing.get_context("spawn").Process(target=replay_experts, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def replay_experts(tmp_path: Path) -> None:
    """Random weights in float32; an actor in bf16, which would choose others, comes closer to the engine with them."""
    folder = save_tiny_model(tmp_path / "model", family="qwen3_vl_moe")
    chosen = ["worker.actor.routing_replay=true", "data.max_prompt_length=2048"]
    chosen += ["worker.rollout.max_num_batched_tokens=4096"]
    engine, data, processor = start(tmp_path, folder, *chosen)
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    exact, rounded = (load_model(str(folder), dtype) for dtype in (torch.float32, torch.bfloat16))
    for change in (0.0, 0.3):  # as loaded, and after a weight sync
        with torch.no_grad():
            for model in (exact, rounded):
                generator = torch.Generator().manual_seed(0)
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_((change * parameter.abs().float().mean() * noise).to(parameter.dtype))
        if change:
            engine.load_weights([(name, tensor.clone()) for name, tensor in exact.state_dict().items()])
        plain = sample(engine, prompts, with_experts=False)  # leaves prompts in the cache whose experts nobody noted
        samples = sample(engine, prompts)
        assert "experts" not in plain.non_tensor_batch
        assert plain.batch["responses"].equal(samples.batch["responses"])
        mask, experts = samples.batch["response_mask"], samples.non_tensor_batch["experts"]
        lengths = prompts.batch["prompt_mask"].sum(-1) + mask.sum((-1, -2))
        assert [tuple(rows.shape) for rows in experts] == [(int(length), 3, 2) for length in lengths]
        assert len(torch.cat([*experts])[:, 0].unique()) == 8  # all are chosen somewhere
        gap = largest_gap(
            samples.batch["rollout_log_probs"], actor_log_probs(exact, prompts, samples, processor), mask
        )
        print(f"largest gap with replay after a change of {change}: {gap:.1e}")
        assert gap < 1e-5
    with_replay = actor_log_probs(rounded, prompts, samples, processor)
    del samples.non_tensor_batch["experts"]
    own = actor_log_probs(rounded, prompts, samples, processor)
    gaps = [(part - samples.batch["rollout_log_probs"]).abs()[mask].mean() for part in (with_replay, own)]
    print(f"mean gap of bf16 with replay {gaps[0]:.1e}, without {gaps[1]:.1e}")
    assert gaps[0] < 1.2 * gaps[1]  # two roundings beside each other, of which the choice of experts is one


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_an_engine_of_linear_attention_agrees_in_bf16(tmp_path, family):
    process = multiprocessing.get_context("spawn").Process(target=agree_in_bf16, args=(tmp_path, family))
    process.start()
    process.join()
    assert process.exitcode == 0


def agree_in_bf16(tmp_path: Path, family: str) -> None:
    """The one type in which vLLM computes it on a CPU: as loaded, and after a weight sync."""
    folder = save_tiny_model(tmp_path / "model", family=family)
    chosen = ["worker.rollout.dtype=bf16", "worker.rollout.enable_chunked_prefill=true"]
    chosen += ["data.max_prompt_length=2048", "worker.rollout.max_num_batched_tokens=4096"]
    model, before = load_model(str(folder), torch.bfloat16), load_model(str(folder), torch.bfloat16)
    engine, data, processor = start(tmp_path, folder, *chosen, block_size=None)
    prompts = collate_prompts(list(data), processor.tokenizer.pad_token_id)
    for change in (0.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((change * parameter.abs().float().mean() * noise).bfloat16())
        if change:
            engine.load_weights([(name, tensor.clone()) for name, tensor in model.state_dict().items()])
        samples = sample(engine, prompts)
        mask = samples.batch["response_mask"].bool()
        own, old = (actor_log_probs(which, prompts, samples, processor) for which in (model, before))
        gap = float((own - samples.batch["rollout_log_probs"]).abs()[mask].mean())
        moved = float((own - old).abs()[mask].mean())
        print(f"{family}, weights changed by {change}: mean gap {gap:.1e}, of the weights before {moved:.1e}")
        assert gap < 0.01
    assert moved > 5 * gap
