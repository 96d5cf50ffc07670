"""The processor of a model: tokenizer, chat template and, for vision models, image processor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from verl.config.records import Config, ConfigError


class TextProcessor:
    """A tokenizer with the interface of a processor, for text models."""

    image_processor = None
    image_token_id = None
    video_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        """As of a processor; concatenates the text parts of each message.

        Raises:
            ValueError: a message has an image.
        """
        plain = []
        for message in messages:
            if any(part["type"] != "text" for part in message["content"]):
                raise ValueError("the prompt shows an image and the model reads none; set data.text_only=true")
            plain.append(message | {"content": "".join(part["text"] for part in message["content"])})
        return self.tokenizer.apply_chat_template(plain, **options)

    def save_pretrained(self, folder: Any) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def load_processor(path: str, trust_remote_code: bool = False, knob: str = "worker.actor.model.model_path") -> Any:
    """The processor of a folder or hub name, a TextProcessor where there is only a tokenizer.

    Raises:
        ConfigError: nothing can be loaded; the message names `knob`.
    """
    try:
        loaded = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{knob} = {path!r}: no processor can be loaded from it: {error}"]) from error
    if isinstance(loaded, ProcessorMixin):
        return loaded
    if isinstance(loaded, PreTrainedTokenizerBase) and len(loaded) > 1:  # one token: made without files
        return TextProcessor(loaded)
    raise ConfigError([f"{knob} = {path!r}: holds no tokenizer; give the model's own folder"])


def load_run_processor(config: Config) -> Any:
    """The processor of a run, of model_path or tokenizer_path, with the configured chat template.

    Raises:
        ConfigError: there is none, or it has no chat template, or no token to pad with.
    """
    model, template_path = config.worker.actor.model, config.data.override_chat_template
    knob = "worker.actor.model." + ("tokenizer_path" if model.tokenizer_path else "model_path")
    path = model.tokenizer_path or model.model_path
    processor = load_processor(path, model.trust_remote_code, knob)
    if template_path is not None:
        processor.tokenizer.chat_template = Path(template_path).read_text(encoding="utf-8")
        processor.chat_template = processor.tokenizer.chat_template
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise ConfigError([f"{knob} = {path!r}: it has no chat template; give one with data.override_chat_template"])
    _add_pad_token(processor.tokenizer, f"{knob} = {path!r}")
    return processor


def _add_pad_token(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    """Takes the end token for padding where there is no pad token: masks hide it, so any token does."""
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise ConfigError([f"{origin}: its tokenizer has neither a pad_token nor an eos_token; add one to its files"])
    tokenizer.pad_token = tokenizer.eos_token


def threads_per_rank(config: Config) -> int:
    """CPU threads per rank: available cores / ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // config.trainer.n_gpus_per_node)


def vision_token_ids(processor: Any) -> list[int]:
    """Image and video token ids, which must not be sampled: a response has no images."""
    return [token for token in (processor.image_token_id, processor.video_token_id) if token is not None]


def pixel_limits(processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """`min_pixels` and `max_pixels` of images, None: the image processor's defaults; empty for a text model."""
    if processor.image_processor is None:
        return {}
    size = processor.image_processor.size
    return {"min_pixels": min_pixels or size["shortest_edge"], "max_pixels": max_pixels or size["longest_edge"]}
