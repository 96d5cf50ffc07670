"""Random models of a few thousand parameters with a byte-level tokenizer, for tests that load models from folders."""

from pathlib import Path

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(tokenizer, family):
    import transformers

    from tests.support.tiny_qwen import CLASSES, config_arguments

    config_name, class_name = CLASSES[family]
    arguments = config_arguments(family, tie_word_embeddings=True)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {"vocab_size": 320, "max_position_embeddings": 4096}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"pad_token_id": ids["<|endoftext|>"]}
    if "vision_config" not in arguments:
        arguments |= text
    else:
        arguments |= {"text_config": arguments["text_config"] | text}
        arguments |= {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
    return getattr(transformers, config_name)(**arguments, architectures=[class_name], dtype="float32")


def build_processor(tokenizer, family):
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    names = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    names |= dict.fromkeys(("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), names["qwen3_vl"])
    if family not in names:
        return tokenizer
    is_third = family.startswith(("qwen3_vl", "qwen3_5"))
    image_processor = Qwen2VLImageProcessor(
        min_pixels=56 * 56, max_pixels=112 * 112, patch_size=16 if is_third else 14
    )
    video_processor = Qwen3VLVideoProcessor() if is_third else Qwen2VLVideoProcessor()
    processor_class = getattr(transformers, names[family])
    return processor_class(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)


def save_tiny_model(folder: Path, seed: int = 0, family: str = "qwen2_5_vl") -> Path:
    """Write a model folder as a trainer or the hub would: config, weights, tokenizer, processor, chat template."""
    import torch
    import transformers

    tokenizer = build_tokenizer()
    config = build_config(tokenizer, family)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer, family).save_pretrained(folder)
    return folder
