"""A benchmark: its location, the meaning of its columns, and the rule by which it is scored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from evaluation.scoring.strict import Form

ReferenceKind = Literal["choice", "index", "value", "choice_or_value", "flag"]
"""Content of the answer column: a choice (letter or text); its index; an open text or number; either; a flag."""

FULL_TEMPLATE = "spatial_thinker_full"
QUESTION_TEMPLATES = ("reasoning", "reasoning_end", "no_reasoning", "spatial_thinker", FULL_TEMPLATE)


@dataclass(frozen=True)
class Grouping:
    """Rule that groups items; a group counts as right when all of its items are."""

    columns: tuple[str, ...] = ()
    """Columns whose values together name the group; without any, rows 2k and 2k + 1 of one task are a group."""
    dropped: str = ""
    """Regular expression of what is taken out of that name."""

    def name_group(self, index: int, row: dict[str, Any], task: str | None) -> str:
        """Return the name of a row's group."""
        if not self.columns:
            return f"{index // 2}/{task}"
        name = "/".join(str(row[column]) for column in self.columns)
        return re.sub(self.dropped, "", name) if self.dropped else name


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's location and the meaning of its columns."""

    repo: str
    """Repository on the Hugging Face hub."""
    split: str
    config: str | None = None
    data_file: str | None = None
    """The one file of the repository that is read, where it holds others beside it."""
    revision: str | None = None
    """Commit of the repository; None takes its newest."""
    images: tuple[str, ...] = ("image",)
    """Image columns in the order in which a model sees them; empty ones of a row are skipped."""
    max_images: int = 1
    """Most images in one cell of an image column."""
    question: str | None = "prompt"
    """Column of the question; None where the picture holds it."""
    answer: str | None = "answer"
    """Column of the reference; None where a mask is the reference."""
    reference: ReferenceKind = "choice"
    choices: str | None = None
    """Column with the list of choices."""
    choice_columns: tuple[str, ...] = ()
    """Columns with one choice each, in place of a list; empty ones are skipped."""
    has_choices_in_question: bool = False
    """True where the choices are parsed from the question's own text."""
    fixed_choices: tuple[str, ...] = ()
    lists_choices: bool = False
    """True where the choices must be added to the question's text."""
    asks_for_tags: bool = False
    """True where the question itself must request answer tags, as in the released evaluation."""
    task: str | None = None
    prompt: str | None = None
    """Column with the complete training prompt, which template spatial_thinker_full then takes as it is."""
    ground_truth: str | None = None
    """Column with the reference scene and answer: with it the dense reward is measured, too."""
    groupings: Mapping[str, Grouping] = field(default_factory=dict)
    """Group accuracies that are reported beside the accuracy, by name."""
    cluster: Grouping | None = None
    """Items that depend on each other, for the standard error."""
    archives: tuple[str, ...] = ()
    """Files of the repository, as glob patterns, that hold the images or videos; a zip file is read in place."""
    media: str = ""
    """Name of an item's file in them, from the row's columns; {file} is a cell of the image column."""
    frames: int = 0
    """Frames of a video that a model sees in place of it, spread evenly from its first to its last; 0 for images."""
    form: Form = "exact"
    """Rule by which an open answer is scored; a choice is right or wrong."""
    forms: Mapping[str, Form] = field(default_factory=dict)
    """Forms of single tasks that differ from it."""
    shuffles_choices: bool = False
    """True where the right choice has a fixed place in the data; the item's number is the seed."""
    mask: str | None = None
    """Image column with the mask in which points must lie."""
    box: str | None = None
    """Column with the box [x, y, width, height] in pixels that must be found beside the right choice."""
    has_tags: bool = False
    """True where tags mark parts of the question: ATT, POS, REL, and choice around the list of choices."""
    precision: str | None = None
    """Column with the decimals to which numbers are rounded before they are compared."""
    context: str | None = None
    """Column with a text that stands before the question."""
    request: str = ""
    """Sentence after an open question that says in what form the answer is scored."""
    named_images: str = ""
    """Pattern of an image's name in the question, one group for its number: only the images named are sent."""
    facts: tuple[str, ...] = ()
    """Columns that the benchmark's own rule needs."""
    rule: str | None = None
    """Own figures of the benchmark, beside plain accuracy: a name of RULES in evaluation/reports/official.py."""
    source: str = "hunarbatra/SpatialThinker, the released evaluation"
    """Loader or card from which the columns and the rule were read."""
    is_shuffled: bool = True
    templates: tuple[str, ...] = QUESTION_TEMPLATES

    @property
    def is_multiple_choice(self) -> bool:
        """True where the released evaluation maps answers to letters."""
        return self.reference in ("choice", "index", "flag") or (
            self.reference == "choice_or_value" and not self.lists_choices
        )

    @property
    def column_names(self) -> list[str]:
        """The columns that the data must have, images first."""
        groupings = [*self.groupings.values(), *([self.cluster] if self.cluster else [])]
        grouped = [column for grouping in groupings for column in grouping.columns]
        media = [name for _, name, _, _ in Formatter().parse(self.media) if name and name != "file"]
        names = [*self.images, *media, self.mask, self.context, self.question, self.answer, self.choices]
        names += [*self.choice_columns, self.box, self.task, self.precision, *self.facts, *grouped]
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def images_per_item(self) -> int:
        """The most images of one question."""
        return self.frames or max(1, len(self.images)) * self.max_images
