"""From a benchmark's row to what a model is asked: text read and checked at once, images only when needed.

Images stay encoded in the data set's memory-mapped file until an item is sent, so that memory does not grow with the
number of items.
"""

import ast
import hashlib
import io
import json
import random
import re
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks import FULL_TEMPLATE, Benchmark
from evaluation.scoring import LETTERS, Reference, resolve_reference
from spatialthinker.prompts import render_prompt

if TYPE_CHECKING:
    from PIL import Image

IMAGE_MARK = "<image>"
_QUESTION_IN_PICTURE = "Answer the question in the picture."
_ANSWER_TAGS = "Put your final answer between <answer> and </answer>."
# Two benchmarks end their questions with a request that contradicts every template with tags.
_BARE_ANSWER_REQUEST = re.compile(r"\s*Please answer directly with (only the letter|a single word or number)[^.]*\.")
_FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_SPLIT_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark."""

    id: str
    """Its position in the split, written with leading zeros: stable under shuffling and cutting."""
    question: str
    choices: tuple[str, ...]
    reference: Reference
    task: str | None
    read_images: Callable[[], "list[Image.Image]"]
    """Decode the images: upright, RGB, in their own size. ValueError if one cannot be read."""
    prompt: str | None = None
    """The complete training prompt where the row holds it."""
    ground_truth: str | None = None


@dataclass(frozen=True)
class Request:
    """What is sent to a model: the text, with an image mark at each image's place, and the images."""

    prompt: str
    images: "list[Image.Image]"


def build_request(sample: Sample, template: str) -> Request:
    """Return the sample's prompt under a template together with its decoded images.

    Errors: ValueError if an image cannot be read or the text's image marks do not fit the images.
    """
    images = sample.read_images()
    if template == FULL_TEMPLATE and sample.prompt is not None:
        prompt = sample.prompt
    else:
        # Templates state the size of the first image and show one mark at most; here every image gets one.
        prompt = render_prompt(template, sample.question, *images[0].size).removeprefix(IMAGE_MARK)
    marks = prompt.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise ValueError(f"item {sample.id}: its prompt has {marks} image marks for {len(images)} images")
    if marks == 0:
        prompt = IMAGE_MARK * len(images) + prompt
    return Request(prompt, images)


def load_samples(
    name: str, benchmark: Benchmark, data_path: str | None = None, split: str | None = None
) -> list[Sample]:
    """Return every item of a benchmark in the order of its rows.

    Errors: FileNotFoundError or ValueError that names the path, the missing columns or the faulty row.
    """
    rows = read_rows(benchmark, data_path, split or benchmark.split)
    texts = [benchmark.question, benchmark.answer, benchmark.choices, benchmark.task]
    wanted = [column for column in (*texts, *benchmark.images) if column is not None]
    extra = [column for column in (benchmark.prompt, benchmark.ground_truth) if column in rows.column_names]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; the data has {', '.join(rows.column_names)}")
    images = rows.select_columns(list(benchmark.images))
    folder = Path(data_path).parent if data_path and Path(data_path).is_file() else Path(data_path or ".")
    text_rows = rows.select_columns([c for c in (*wanted, *extra) if c not in benchmark.images])
    samples = []
    for index, row in enumerate(text_rows):
        item_id = f"{index:06d}"
        try:
            sample = _build_sample(benchmark, item_id, row)
        except ValueError as error:
            raise ValueError(f"{name}, row {index}: {error}") from error
        samples.append(replace(sample, read_images=_image_reader(images, index, item_id, folder)))
    return samples


def select_samples(
    samples: Sequence[Sample], benchmark: Benchmark, seed: int, num_samples: int | None
) -> list[Sample]:
    """Return the items in the order of evaluation: the whole set shuffled, and only then cut."""
    chosen = list(samples)
    if benchmark.is_shuffled:
        random.Random(seed).shuffle(chosen)
    return chosen[:num_samples]


def fingerprint_samples(samples: Sequence[Sample]) -> str:
    """Return a hash of all questions, choices and references: another data set is never taken for the same one."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample.id, sample.prompt or sample.question, sample.choices, sample.reference, sample.ground_truth)
        digest.update(repr(parts).encode())
    return digest.hexdigest()[:16]


def _build_sample(benchmark: Benchmark, item_id: str, row: dict[str, Any]) -> Sample:
    choices = benchmark.fixed_choices
    if benchmark.choices is not None:
        choices = _strip_letters(parse_list(row[benchmark.choices]))
    question = _QUESTION_IN_PICTURE if benchmark.question is None else str(row[benchmark.question] or "")
    if not question.strip():
        raise ValueError(f"column {benchmark.question} is empty")
    question = _BARE_ANSWER_REQUEST.sub("", question)
    if benchmark.lists_choices and choices:
        lines = (f"({LETTERS[i]}) {text}" for i, text in enumerate(choices))
        question = "\n".join([question, "Options:", *lines])
    if benchmark.asks_for_tags:
        question = f"{question} {_ANSWER_TAGS}"
    return Sample(
        id=item_id,
        question=question,
        choices=choices,
        reference=resolve_reference(row[benchmark.answer], benchmark.reference, choices),
        task=None if benchmark.task is None else str(row[benchmark.task]),
        read_images=list,
        prompt=row.get(benchmark.prompt) if benchmark.prompt else None,
        ground_truth=row.get(benchmark.ground_truth) if benchmark.ground_truth else None,
    )


def parse_list(value: Any) -> tuple[str, ...]:
    """Return the texts of a list that may be written as JSON, as a Python literal or as numpy prints it.

    In the last, `['a' 'b']`, no comma stands between the elements: Python alone would read one text "ab".
    Errors: ValueError for anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, str):
        return tuple(str(element) for element in value)
    text = value.strip()
    if not text:
        return ()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(f"{value!r} is no list")
    try:
        return tuple(str(element) for element in json.loads(text))
    except json.JSONDecodeError:
        pass
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text[1:-1]).readline))
        strings = [token.string for token in tokens if token.type == tokenize.STRING]
        others = [token.string for token in tokens if token.type in (tokenize.NAME, tokenize.NUMBER)]
        if strings and not others:
            return tuple(str(ast.literal_eval(string)) for string in strings)
        return tuple(str(element) for element in ast.literal_eval(text))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise ValueError(f"{value!r} is no list") from error


def _strip_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the letters of choices that all carry their own, such as "(A) dog"."""
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices, at most {len(LETTERS)} have a letter")
    found = [re.match(rf"\(?{LETTERS[i]}[).:]\s+(?=\S)", text) for i, text in enumerate(choices)]
    if choices and all(found):
        return tuple(text[match.end() :] for text, match in zip(choices, found, strict=True) if match)
    return choices


def _image_reader(images: Any, index: int, item_id: str, folder: Path) -> "Callable[[], list[Image.Image]]":
    def read() -> "list[Image.Image]":
        values = [value for column in images[index].values() for value in _as_list(column) if value is not None]
        if not values:
            raise ValueError(f"item {item_id}: no image")
        return [_open_image(value, item_id, folder) for value in values]

    return read


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _open_image(value: Any, item_id: str, folder: Path) -> "Image.Image":
    from PIL import Image, ImageOps, UnidentifiedImageError

    source: Any = value
    if isinstance(value, dict):
        source = value.get("bytes") or value.get("path")
    if isinstance(source, str):
        source = folder / source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, AttributeError, Image.DecompressionBombError) as error:
        raise ValueError(f"item {item_id}: its image cannot be decoded: {error}") from error


def read_rows(benchmark: Benchmark, data_path: str | None, split: str) -> Any:
    """Return the `datasets.Dataset` of a split, its images left encoded."""
    import datasets

    rows: Any
    if data_path is None:
        rows = datasets.load_dataset(benchmark.repo, benchmark.config, split=split, revision=benchmark.revision)
    elif (Path(data_path) / "state.json").is_file():
        rows = datasets.load_from_disk(data_path)
    else:
        files = find_files(Path(data_path), split)
        kind = _FILE_KINDS[files[0].suffix]
        rows = datasets.load_dataset(kind, data_files={split: [str(path) for path in files]}, split=split)
    for column in benchmark.images:
        feature = rows.features.get(column)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def find_files(path: Path, split: str) -> list[Path]:
    """Return the data files of a split: the file itself, or those of a folder whose names begin with the split."""
    if path.is_file():
        if path.suffix not in _FILE_KINDS:
            raise ValueError(f"{path}: not one of {', '.join(_FILE_KINDS)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    for suffix in _FILE_KINDS:
        found = sorted(path.rglob(f"*{suffix}"))
        for alias in _SPLIT_ALIASES.get(split, (split,)):
            if chosen := [file for file in found if re.match(rf"{re.escape(alias)}(-|\.)", file.name)]:
                return chosen
    names = sorted(file.name for file in path.rglob("*") if file.suffix in _FILE_KINDS)
    raise FileNotFoundError(f"{path}: no data file of split {split!r}; found {', '.join(names) or 'none at all'}")
