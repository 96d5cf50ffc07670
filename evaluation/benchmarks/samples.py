"""From a benchmark's row to what a model is asked: text read and checked at once, images only when needed.

Images stay encoded in the data set's memory-mapped file until an item is sent, so that memory does not grow with the
number of items.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks.benchmark import FULL_TEMPLATE, Benchmark
from evaluation.benchmarks.choices import read_choices
from evaluation.benchmarks.data_files import read_rows
from evaluation.benchmarks.media import MediaFolder, read_frames
from evaluation.benchmarks.templates import render_question
from evaluation.scoring.areas import (
    grade_box,
    grade_choice_and_box,
    grade_points,
    parse_box,
    parse_corner_box,
)
from evaluation.scoring.strict import Grade, Reference, grade_response, resolve_reference
from spatialthinker.prompts import IMAGE_MARK
from spatialthinker.schema import question_with_options
from spatialthinker.storage.images import BrokenImage, find_image, load_image, read_file

if TYPE_CHECKING:
    from PIL import Image

_QUESTION_IN_PICTURE = "Answer the question in the picture."
_IN_MASK = "points in the mask"
_FRAMES = "These are frames of a video, in order."
_ANSWER_TAGS = "Put your final answer between <answer> and </answer>."
# Some benchmarks end their questions with a request that contradicts every template with tags.
_BARE_ANSWER_REQUEST = re.compile(
    r"(?<!\s)\s*(?:Please answer directly with (?:only the letter|a single word or number)"
    r"|Answer with the option's letter from the given choices)[^.]{0,200}\."
)


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark."""

    id: str
    """Its position in the split, written with leading zeros: stable under shuffling and cutting."""
    question: str
    choices: tuple[str, ...]
    reference: Reference
    task: str | None
    read_encoded: Callable[[], list[bytes]]
    """Return the image files as they are. ValueError if one cannot be read."""
    prompt: str | None = None
    """The complete training prompt where the row holds it."""
    ground_truth: str | None = None
    answer_cell: str = ""
    """The answer column as it is written, for the released rule."""
    groups: dict[str, str] = field(default_factory=dict)
    """The group that the item belongs to, by the grouping's name."""
    cluster: str | None = None
    """Items of one cluster depend on each other."""
    facts: dict[str, Any] | None = None
    """Values of the row that the benchmark's own rule needs."""
    read_mask: Callable[[], bytes] | None = None
    """Return the file of the mask in which points must lie, where the benchmark has one."""
    prefix: str = ""
    """Beginning of the reply that is given to the model."""

    def grade(self, text: str, finish_reason: str | None = None) -> Grade:
        """Return the grade of a complete model text."""
        if self.read_mask is not None:
            return grade_points(text, finish_reason, decode_image(self.read_mask(), self.id).convert("L"))
        if self.reference.box is not None:
            size = self.read_images()[0].size
            return grade_choice_and_box(text, finish_reason, self.choices, self.reference, size)
        if self.reference.form == "box":
            return grade_box(text, finish_reason, self.reference, self.read_images()[0].size)
        return grade_response(text, self.choices, self.reference, finish_reason)

    def read_images(self) -> "list[Image.Image]":
        """Return the images: upright, RGB, in their own size. Errors: ValueError if one cannot be read."""
        return [decode_image(data, self.id) for data in self.read_encoded()]


@dataclass(frozen=True)
class Request:
    """A model's input: the text, with an image mark at each image's place, and the images."""

    prompt: str
    images: "list[Image.Image]"
    encoded: list[bytes]
    """The images' files, for those who send them on as they are."""
    prefix: str = ""
    """Beginning of the reply that is given."""


def build_request(sample: Sample, template: str) -> Request:
    """Return the sample's prompt under a template together with its decoded images.

    Errors: ValueError if an image cannot be read, the text's marks do not fit the images, or anything else fails.
    """
    try:
        return _build_request(sample, template)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 -- the other items go on, and the error is told
        raise ValueError(f"item {sample.id}: {type(error).__name__}: {error}") from error


def _build_request(sample: Sample, template: str) -> Request:
    encoded = sample.read_encoded()
    images = [decode_image(data, sample.id) for data in encoded]
    if sample.read_mask is not None and (size := decode_image(sample.read_mask(), sample.id).size) != images[0].size:
        raise ValueError(f"item {sample.id}: its mask is {size[0]} x {size[1]}, its image %d x %d" % images[0].size)
    if template == FULL_TEMPLATE and sample.prompt is not None:
        prompt = sample.prompt
    else:
        prompt = render_question(template, sample.question, sample.choices, [image.size for image in images])
    marks = prompt.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise ValueError(f"item {sample.id}: its prompt has {marks} image marks for {len(images)} images")
    if marks == 0:
        prompt = IMAGE_MARK * len(images) + prompt
    return Request(prompt, images, encoded, sample.prefix)


def load_samples(
    name: str, benchmark: Benchmark, data_path: str | None = None, split: str | None = None
) -> list[Sample]:
    """Return every item of a benchmark in the order of its rows.

    Errors: FileNotFoundError or ValueError that names the path, the missing columns or the faulty row.
    """
    rows, media = read_rows(benchmark, data_path, split or benchmark.split)
    wanted = benchmark.column_names
    extra = [column for column in (benchmark.prompt, benchmark.ground_truth) if column in rows.column_names]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(f"{name}: no column {', '.join(missing)}; the data has {', '.join(rows.column_names)}")
    pictures = (*benchmark.images, *([benchmark.mask] if benchmark.mask else []))
    images = rows.select_columns(list(pictures)) if pictures else None
    text_rows = rows.select_columns([c for c in (*wanted, *extra) if c not in pictures])
    samples: list[Sample] = []
    lost: dict[int, str] = {}
    is_packed = any(pattern.endswith(".zip") for pattern in benchmark.archives)
    for index, row in enumerate(text_rows):
        item_id = f"{index:06d}"
        try:
            sample = _build_sample(benchmark, index, item_id, row)
        except ValueError as error:
            raise ValueError(f"{name}, row {index}: {error}") from error
        reader = _ImageReader(benchmark, images, index, item_id, media, row)
        mask = reader.read_mask if benchmark.mask else None
        samples.append(replace(sample, read_encoded=reader.read, read_mask=mask))
        if is_packed and (missing := [file for file in reader.list_files() if not media.has(file)]):
            lost[index] = missing[0]
    if lost:
        archives = ", ".join(path.name for path in media.archives)
        place = f"in none of {archives}" if archives else f"not in {media.folder}"
        index, file = next(iter(lost.items()))
        count = f" ({len(lost)} of {len(samples)} items lack one)" if len(lost) > 1 else ""
        raise ValueError(f"{name}, row {index}: {file} is {place}; fetch the files again{count}")
    sizes = {grouping: Counter(sample.groups[grouping] for sample in samples) for grouping in benchmark.groupings}
    for sample in samples:
        if sample.facts is not None:  # a group of which an item is missing must not count
            sample.facts["sizes"] = {grouping: sizes[grouping][group] for grouping, group in sample.groups.items()}
    return samples


def select_samples(
    samples: Sequence[Sample],
    benchmark: Benchmark,
    seed: int,
    num_samples: int | None = None,
    limit_per_task: int | None = None,
) -> list[Sample]:
    """Return the items in the order of evaluation: the whole set shuffled, and only then cut."""
    chosen = list(samples)
    if benchmark.is_shuffled:
        random.Random(seed).shuffle(chosen)
    if limit_per_task is not None:
        seen: Counter[str | None] = Counter()
        kept = []
        for sample in chosen:
            seen[sample.task] += 1
            if seen[sample.task] <= limit_per_task:
                kept.append(sample)
        chosen = kept
    return chosen[:num_samples]


def fingerprint_samples(samples: Sequence[Sample]) -> str:
    """Return a hash of all questions, choices and references: another data set is never taken for the same one."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample.id, sample.prompt or sample.question, sample.choices, sample.reference, sample.ground_truth)
        digest.update(repr(parts).encode())
        if sample.reference.box is not None:
            digest.update(repr(sample.reference.box).encode())
    return digest.hexdigest()[:16]


def _build_sample(benchmark: Benchmark, index: int, item_id: str, row: dict[str, Any]) -> Sample:
    question = _QUESTION_IN_PICTURE if benchmark.question is None else str(row[benchmark.question] or "")
    if not question.strip():
        raise ValueError(f"column {benchmark.question} is empty")
    question = _BARE_ANSWER_REQUEST.sub("", _without_tags(question) if benchmark.has_tags else question).rstrip()
    if benchmark.context and row[benchmark.context]:
        question = f"{str(row[benchmark.context]).strip()}\n{question}"
    choices = read_choices(benchmark, row, question)
    if benchmark.shuffles_choices:
        choices = tuple(random.Random(index).sample(choices, len(choices)))
    cell = row[benchmark.answer] if benchmark.answer else _IN_MASK
    if benchmark.form in ("points", "box"):
        reference = Reference(None, "null" if cell is None else str(cell))
    elif benchmark.has_choices_in_question and not choices:  # written in some other way: its letter still counts
        reference = resolve_reference(cell, "value", ())
    else:
        reference = resolve_reference(cell, benchmark.reference, choices)
    if benchmark.box:
        if not choices:
            raise ValueError(f"column {benchmark.question} lists no choices")
        reference = replace(reference, box=parse_corner_box(row[benchmark.box]))
        question = f"{question} {benchmark.request}"
    elif reference.letter is None:
        reference = _state_form(benchmark, row, reference)
        question = f"{question} {benchmark.request}".rstrip()
    if benchmark.frames:
        question = f"{_FRAMES}\n{question}"
    if benchmark.lists_choices and choices:
        question = question_with_options(question, choices)
    if benchmark.asks_for_tags:
        question = f"{question} {_ANSWER_TAGS}"
    task = None if benchmark.task is None else str(row[benchmark.task])
    return Sample(
        id=item_id,
        question=question,
        choices=choices,
        reference=reference,
        task=task,
        read_encoded=list,
        prompt=row.get(benchmark.prompt) if benchmark.prompt else None,
        ground_truth=row.get(benchmark.ground_truth) if benchmark.ground_truth else None,
        answer_cell=str(cell),
        groups={name: grouping.name_group(index, row, task) for name, grouping in benchmark.groupings.items()},
        cluster=benchmark.cluster.name_group(index, row, task) if benchmark.cluster else None,
        facts={name: row[name] for name in benchmark.facts} | {"choices": len(choices)} if benchmark.rule else None,
    )


def _without_tags(question: str) -> str:
    """Return a question without its tags, its choices on a line of their own with capital letters."""
    tagged = re.sub(
        r"\s*<choice>(.*?)</choice>\s*",
        lambda match: "\nOptions: " + re.sub(r"\(([a-z])\)", lambda mark: f"({mark[1].upper()})", match[1]) + "\n",
        question,
        flags=re.DOTALL,
    )
    return re.sub(r"</?(?:ATT|POS|REL|choice)>", "", tagged)


def _state_form(benchmark: Benchmark, row: dict[str, Any], reference: Reference) -> Reference:
    """Return an open reference with its form and precision. Errors: ValueError for one that is not of its form."""
    form = benchmark.forms.get(str(row[benchmark.task]), benchmark.form) if benchmark.task else benchmark.form
    if form in ("relative", "count"):
        try:
            float(reference.text or "")
        except ValueError:
            raise ValueError(f"answer {reference.text!r} is no number") from None
    elif form == "box":
        parse_box(reference.text or "")
    decimals = row[benchmark.precision] if benchmark.precision else None
    return replace(reference, form=form, decimals=None if decimals is None else int(decimals))


class _ImageReader:
    """The images of one item, read when they are asked for."""

    def __init__(
        self, benchmark: Benchmark, images: Any, index: int, item_id: str, media: MediaFolder, row: dict[str, Any]
    ) -> None:
        self._benchmark, self._images, self._index = benchmark, images, index
        self._item_id, self._media, self._row = item_id, media, row

    def read(self) -> list[bytes]:
        """Return the image files. Errors: ValueError that names the item."""
        encoded = [_read_cell(value, self._item_id, self._media) for value in self._cells()]
        if not encoded:
            raise ValueError(f"item {self._item_id}: no image")
        if not self._benchmark.frames:
            return encoded
        try:
            return [frame for video in encoded for frame in read_frames(video, self._benchmark.frames)]
        except ValueError as error:
            raise ValueError(f"item {self._item_id}: {', '.join(self.list_files())}: {error}") from None

    def read_mask(self) -> bytes:
        """Return the mask's file. Errors: ValueError that names the item."""
        cell = self._images[self._index][self._benchmark.mask]
        return _read_cell(cell, self._item_id, self._media)

    def list_files(self) -> list[str]:
        """Return the names of the item's files, where its images are files."""
        return [value for value in self._cells() if isinstance(value, str)]

    def _cells(self) -> list[Any]:
        benchmark = self._benchmark
        if not benchmark.images:
            return [benchmark.media.format(**self._row)]
        names = benchmark.images
        if benchmark.named_images and (named := self._named_columns()):
            names = named
        columns = self._images[self._index]
        values = [value for name in names for value in _as_list(columns[name]) if value is not None]
        if benchmark.media:
            values = [benchmark.media.format(file=value, **self._row) for value in values]
        return values

    def _named_columns(self) -> tuple[str, ...]:
        """Return the image columns that the question names, in the order in which it does, each once."""
        text = " ".join(str(self._row[name]) for name in (self._benchmark.question, self._benchmark.choices) if name)
        numbers = dict.fromkeys(int(number) for number in re.findall(self._benchmark.named_images, text))
        return tuple(name for number in numbers if (name := f"image_{number}") in self._benchmark.images)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_cell(value: Any, item_id: str, media: MediaFolder) -> bytes:
    """Return the file that a cell holds: itself, its base64 text or its path below the folder or in an archive."""
    try:
        if isinstance(value, str) and media.find_member(value):
            return media.read(value)
        source = find_image(value, media.folder)
        if source is None:
            raise ValueError("the cell is empty")
        return read_file(source)
    except ValueError as error:
        raise ValueError(f"item {item_id}: its image cannot be read: {error}") from error


def decode_image(data: bytes, item_id: str) -> "Image.Image":
    """Return an image file's picture, upright and RGB. Errors: ValueError that names the item."""
    try:
        return load_image(data)
    except BrokenImage as error:
        raise ValueError(f"item {item_id}: its image cannot be decoded: {error}") from error
