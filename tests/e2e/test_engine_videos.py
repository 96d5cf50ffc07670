"""Engine and trainer see the same videos: token ids, M-RoPE positions and log-probs of the engine's samples."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from spatialthinker.storage.images import load_image
from tests.support.tiny_model_folder import save_tiny_model
from tests.support.tiny_qwen import VISION_FAMILIES
from tests.support.training import ROOT
from tests.support.videos import frame_list, open_rows, write_video
from verl.config.loading import load_config
from verl.data.dataset import collate_prompts
from verl.data.processor import load_processor, load_run_processor, vision_token_ids
from verl.model.qwen_vl import ResponseLogProbs, image_patches, load_model
from verl.model.videos import engine_inputs, in_order, writes_timestamps
from verl.trainer.engine_arguments import rollout_arguments
from verl.trainer.main import video_settings
from verl.workers.actor import Actor, Groups
from verl.workers.rollout import RolloutWorker

pytestmark = pytest.mark.e2e
TEMPERATURE = 0.8
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}


def make_rows(folder):
    """Prompts with a file of an odd rate, a long list, an image beside a video, eight images, and text alone."""
    write_video(folder / "odd.mp4", 23)
    write_video(folder / "long.mp4", 180)
    return [
        {"prompt": "<video>a?", "answer": "a", "images": None, "videos": ["odd.mp4"]},
        {"prompt": "look <video>b?", "answer": "a", "images": None, "videos": ["long.mp4"]},
        {"prompt": "<image>c<video>d<video>?", "answer": "a", "images": frame_list(1), "videos": ["odd.mp4"] * 2},
        {"prompt": "<image>" * 8 + "e?", "answer": "a", "images": frame_list(8, (56, 56)), "videos": None},
        {"prompt": "f?", "answer": "a", "images": None, "videos": None},
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vllms_processor_makes_the_same_inputs_in_every_type(family, dtype, tmp_path):
    """In bf16 too, to which vLLM rounds the seconds that Qwen2.5-VL's positions follow from."""
    from vllm.config import ModelConfig
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs

    folder = save_tiny_model(tmp_path / "model", family=family)
    processor = load_processor(str(folder))
    per_second = float(getattr(AutoConfig.from_pretrained(folder).vision_config, "tokens_per_second", 1.0))
    settings = BOUNDS | {"tokens_per_second": per_second, "max_frames": 32}
    rows = make_rows(tmp_path)[:4]
    data = open_rows(tmp_path, rows, processor, videos=settings, image_dir=str(tmp_path), **BOUNDS)
    limits = dict(data.pixel_limits)
    config = ModelConfig(model=str(folder), dtype=dtype, mm_processor_kwargs=limits, mm_processor_cache_gb=0)
    theirs = MULTIMODAL_REGISTRY.create_processor(config)
    chosen = get_model_cls(config)
    model = chosen.__new__(chosen)  # without weights, for its positions
    torch.nn.Module.__init__(model)
    model.config, model.video_pruning_rate, model.is_multimodal_pruning_enabled = config.hf_config, None, False
    for prompt in data:
        items, options = {}, {}
        if prompt.images:
            items["image"] = [load_image(image) for image in prompt.images]
        if prompt.videos:
            items["video"], options = engine_inputs(prompt.videos, writes_timestamps(processor))
        parsed = theirs.info.parse_mm_data(items)
        inputs = ProcessorInputs(list(prompt.raw_ids), parsed, hf_processor_mm_kwargs=options)
        rendered = theirs.apply(inputs, SimpleNamespace(record=lambda *_: nullcontext()))
        assert rendered["prompt_token_ids"] == prompt.ids.tolist()
        positions, _ = model.get_mrope_input_positions(rendered["prompt_token_ids"], features_of(rendered))
        assert torch.equal(positions, prompt.positions), prompt.row_id
        media = [("image", "pixel_values", prompt.images), ("video", "pixel_values_videos", prompt.videos)]
        for kind, key, shown in media:
            ours, _ = image_patches(
                shown, processor.image_processor, video_processor=processor.video_processor, **limits
            )
            for own, item in zip(ours, rendered["mm_kwargs"].get(kind, []), strict=True):
                assert torch.equal(own.to(config.dtype), item[key].data)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_the_engines_in_tokens_positions_and_log_probs(family, tmp_path):
    folder = save_tiny_model(tmp_path / "model", family=family)
    chosen = [f"data.{name}={value}" for name, value in BOUNDS.items()]
    chosen += [f"data.{split}_files={tmp_path}@train" for split in ("train", "val")]
    chosen += ["data.max_prompt_length=2048", "worker.rollout.max_num_batched_tokens=4096", "data.max_frames=32"]
    config = load_config(
        [f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", f"worker.actor.model.model_path={folder}", *chosen]
    )
    processor = load_run_processor(config)
    settings = video_settings(config, processor)
    rows = make_rows(tmp_path)
    data = open_rows(tmp_path, rows, processor, videos=vars(settings), image_dir=str(tmp_path), **BOUNDS)
    prompts = list(data)
    engine = RolloutWorker(rank=0, world_size=1, **rollout_arguments(config, "cpu", processor))
    engine.load()

    for prompt in prompts:
        rendered = engine._render(prompt.raw_ids, prompt.images, prompt.videos)
        assert rendered["prompt_token_ids"] == prompt.ids.tolist()
        if not prompt.images and not prompt.videos:
            continue
        arguments = rendered["prompt_token_ids"], features_of(rendered)
        (positions,) = engine.llm.collective_rpc(positions_in, args=arguments)
        assert torch.equal(positions, prompt.positions), prompt.row_id

    batch = collate_prompts(prompts, processor.tokenizer.pad_token_id)
    request = batch.select([], ["raw_prompt_ids", "images", "videos"])
    engine.render_ahead(request)
    assert len(engine.rendered) == len(prompts)
    request.meta_info = {"sampling": {"n": 3, "temperature": TEMPERATURE}, "seed": 5, "log_probs": True}
    samples = engine.generate(request)
    assert not engine.rendered
    whole = batch.select().union(samples.select(["responses", "response_mask"]))
    media = [each for prompt in prompts for each in in_order(prompt.images, prompt.videos)]
    patches = image_patches(
        media, processor.image_processor, video_processor=processor.video_processor, **data.pixel_limits
    )
    scorer = ResponseLogProbs(load_model(str(folder), torch.float32), vision_token_ids(processor)).eval()
    actor = Actor(scorer, torch.device("cpu"))
    groups = Groups.from_proto(whole, *patches)
    own, _ = actor.compute_log_probs(groups, 8192, True, TEMPERATURE)
    mask = samples.batch["response_mask"]
    gap = (samples.batch["rollout_log_probs"] - own).abs()[mask].max()
    print(f"{family}: largest gap {gap:.1e}")
    assert gap < 1e-5

    groups.pixels = [pixels.flip(0) for pixels in groups.pixels]
    other, _ = actor.compute_log_probs(groups, 8192, True, TEMPERATURE)
    moved = [(own - other).abs()[row][mask[row]].max() for row in range(len(prompts))]
    assert min(moved[:4]) > 1e-4 and moved[4] < 1e-6


def positions_in(worker, ids, features):
    return worker.model_runner.get_model().get_mrope_input_positions(ids, features)[0]


def features_of(rendered):
    """A rendered prompt's media as vLLM's models are given them for positions."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    return [
        MultiModalFeatureSpec(data=item, modality=modality, identifier=str(number), mm_position=place)
        for modality, items in rendered["mm_kwargs"].items()
        for number, (item, place) in enumerate(zip(items, rendered["mm_placeholders"][modality], strict=True))
    ]
