"""The toy model's parts, all of the real classes: tokenizer, processor, chat template, configuration.

The last two are those of configs/toy_model; the template follows Qwen2.5-VL's in the structure of a conversation.
Nothing here is trained, apart from the tokenizer's merges; `build_toy_model.py` trains the weights.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from spatialthinker.prompts import IMAGE_MARK, PROMPTS
from spatialthinker.synthetic import generate, gold_response

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "toy_model"
_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
IMAGE_PX = 112
SYSTEM_PROMPT = "You are a helpful assistant."  # as the chat template has it

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


def fixed_texts() -> list[str]:
    """Instructions that every prompt repeats: the paragraphs around the size and the question, and the system turn."""
    texts = [f"system\n{SYSTEM_PROMPT}"]
    for name in ("spatial_thinker_full", "spatial_thinker"):
        pieces = re.split(rf"{IMAGE_MARK}|\$\w+", PROMPTS[name])
        texts += [paragraph for piece in pieces for paragraph in re.split(r"(?<=\n\n)", piece) if len(paragraph) > 12]
    return list(dict.fromkeys(texts))


def build_tokenizer():
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
    for _, row in generate(6000, seed=0, split="tokenizer"):
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
        chat_template=(FOLDER / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def build_config(tokenizer):
    """The Qwen2.5-VL of FOLDER, 2.8 M parameters, with this tokenizer's number of tokens.

    It has four text layers, three tower blocks and heads of 32 throughout. Channels of height and width sit at the
    slow end of RoPE's spectrum; a small theta keeps neighbouring cells of a four by four grid apart there.
    """
    from transformers import Qwen2_5_VLConfig

    config: Any = Qwen2_5_VLConfig.from_pretrained(FOLDER)
    config.text_config.vocab_size = 8 * -(-len(tokenizer) // 8)
    return config


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
