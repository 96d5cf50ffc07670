"""The tokenizer, chat template and image processor of a run: loaded the same way wherever they are needed."""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from verl.config import Config, ConfigError


def load_processor(config: Config) -> Any:
    """The processor of the model to train, with the run's chat template; of a text model its tokenizer.

    Raises:
        ConfigError: there is none, or it has no chat template.
    """
    model, template_path = config.worker.actor.model, config.data.override_chat_template
    key = "worker.actor.model." + ("tokenizer_path" if model.tokenizer_path else "model_path")
    path = model.tokenizer_path or model.model_path
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key} = {path!r}: no processor can be loaded from it: {error}"]) from error
    if template_path is not None:
        template = Path(template_path).read_text(encoding="utf-8")
        processor.chat_template = template
        if hasattr(processor, "tokenizer"):
            processor.tokenizer.chat_template = template
    if not processor.chat_template:
        raise ConfigError([f"{key} = {path!r}: it has no chat template; give one with data.override_chat_template"])
    return processor
