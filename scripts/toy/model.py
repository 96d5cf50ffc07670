"""The toy model's parts, all of the real classes: tokenizer, processor, chat template, configuration.

Nothing here is trained, apart from the tokenizer's merges; `build_toy_model.py` trains the weights.
"""

import re
import shutil
from pathlib import Path

from spatialthinker.prompts import IMAGE_MARK, PROMPTS
from spatialthinker.synthetic import generate, gold_response

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_PX = 112
SYSTEM_PROMPT = "You are a helpful assistant."

# Pre-tokens, tried in this order: a tag with its line breaks, a JSON key with what surrounds it, a number (so that a
# coordinate is one token), a word with the blank before it, line breaks, other characters.
_PRE_TOKENS = "|".join(
    (
        r"\n?</?(?:observe|scene|think|answer)>\n?",
        r"[^A-Za-z0-9\n<]*\"(?:objects|relationships|bbox)\": [\[{]*",
        r"[^A-Za-z0-9\n<]*\"(?:id|subject|predicate|object)\": \"?",
        r"[0-9]+",
        r" ?[A-Za-z]+",
        r"\n+",
        r"[^A-Za-z0-9\n<]+?(?= ?[A-Za-z]|[0-9\n<]|\Z)",
        r"<",
    )
)

# Written after the structure that Qwen2.5-VL's template gives a conversation.
CHAT_TEMPLATE = (
    """{%- macro part(item) -%}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' or 'video' in item -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in item -%}
{{ item.text }}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\n"""
    + SYSTEM_PROMPT
    + """<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for item in message.content -%}{{ part(item) }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""
)


def fixed_texts() -> list[str]:
    """Instructions that every prompt repeats: the paragraphs around the size and the question, and the system turn."""
    texts = [f"system\n{SYSTEM_PROMPT}"]
    for name in ("spatial_thinker_full", "spatial_thinker"):
        pieces = re.split(rf"{IMAGE_MARK}|\$\w+", PROMPTS[name])
        texts += [paragraph for piece in pieces for paragraph in re.split(r"(?<=\n\n)", piece) if len(paragraph) > 12]
    return list(dict.fromkeys(texts))


def build_tokenizer(rows: int = 6000):
    """A byte-level BPE in which every word, number and piece of JSON of the synthetic rows is one token.

    The fixed instructions are single tokens too: a prompt then costs a tenth of what its letters would.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = [" ".join(map(str, range(IMAGE_PX + 1)))] * 2 + ["<|im_start|>user\n<|im_start|>assistant\n"] * 2
    for _, row in generate(rows, seed=0, split="tokenizer"):
        corpus += [row.question_with_options, gold_response(row)]
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed_texts()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_processor(tokenizer):
    """Qwen2.5-VL's processor around the tokenizer; images keep their size up to four times the toy's own."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 4 * IMAGE_PX * IMAGE_PX}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer):
    """A Qwen2.5-VL of 2.8 M parameters: four text layers, three tower blocks, heads of 32 throughout."""
    from transformers import Qwen2_5_VLConfig

    def token(text: str) -> int:
        return tokenizer.convert_tokens_to_ids(text)

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 8 * -(-len(tokenizer) // 8),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            # Channels of height and width sit at the slow end of the spectrum; a small theta keeps neighbouring
            # cells of a four by four grid apart there.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 192,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def save_parts(folder: Path):
    """Write tokenizer, processor and chat template to a folder; returns the processor."""
    processor = build_processor(build_tokenizer())
    processor.save_pretrained(folder)
    return processor


def copy_parts(source: Path, folder: Path):
    """Copy another toy model's tokenizer, processor and chat template to a folder; returns the processor."""
    from transformers import AutoProcessor

    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return AutoProcessor.from_pretrained(folder)
