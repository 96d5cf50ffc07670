"""The benchmarks, one row each; a new benchmark is a new row.

The columns follow the data sets' own pages on the Hugging Face hub (https://huggingface.co/datasets/REPO).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

ReferenceKind = Literal["choice", "value", "choice_or_value", "flag"]
"""Content of the answer column: a choice (letter, text or index); an open text or number; either; 1 or 0 for yes."""

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
    answer: str = "answer"
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
    archive: str | None = None
    """File of the repository that must be unpacked by hand: the hub's loader cannot read it."""
    is_shuffled: bool = True
    templates: tuple[str, ...] = QUESTION_TEMPLATES

    @property
    def is_multiple_choice(self) -> bool:
        """True where the released evaluation maps answers to letters."""
        return self.reference in ("choice", "flag") or (self.reference == "choice_or_value" and not self.lists_choices)

    @property
    def column_names(self) -> list[str]:
        """The columns that the data must have, images first."""
        groupings = [*self.groupings.values(), *([self.cluster] if self.cluster else [])]
        grouped = [column for grouping in groupings for column in grouping.columns]
        names = [*self.images, self.question, self.answer, self.choices, *self.choice_columns, self.task, *grouped]
        return list(dict.fromkeys(name for name in names if name is not None))


def _cv_bench(config: str) -> Benchmark:
    return Benchmark("nyu-visionx/CV-Bench", "test", config, choices="choices", task="task")


def _blink(config: str, num_images: int = 1) -> Benchmark:
    images = tuple(f"image_{i + 1}" for i in range(num_images))
    return Benchmark("BLINK-Benchmark/BLINK", "val", config, images=images, choices="choices")


def _emma(config: str) -> Benchmark:
    images = tuple(f"image_{i + 1}" for i in range(5))
    row = partial(Benchmark, "luckychao/EMMA", "test", config, images=images, question="question")
    return row(reference="choice_or_value", choices="options", lists_choices=True)


def _mmmu_vision() -> Benchmark:
    row = partial(Benchmark, "MMMU/MMMU_Pro", "test", "vision", question=None)
    return row(choices="options", lists_choices=True, templates=(*QUESTION_TEMPLATES, "vision"))


_PLAIN = partial(Benchmark, choices="choices")

BENCHMARKS: dict[str, Benchmark] = {
    "cv-bench": _cv_bench("default"),
    "cv-bench-2D": _cv_bench("2D"),
    "cv-bench-3D": _cv_bench("3D"),
    "blink-spatial": _blink("Spatial_Relation"),
    "blink-depth": _blink("Relative_Depth"),
    "blink-object": _blink("Object_Localization"),
    "blink-counting": _blink("Counting"),
    "blink-multi-view": _blink("Multi-view_Reasoning", 2),
    "blink-jigsaw": _blink("Jigsaw", 3),
    "realworld_qa": Benchmark("visheratin/realworldqa", "test", question="question", reference="value"),
    "spatialbench": Benchmark(
        "hunarbatra/SpatialBench",
        "train",
        question="text",
        reference="value",
        asks_for_tags=True,
        task="category",
    ),
    "mmvp": Benchmark(
        "hunarbatra/MMVP", "train", question="text", answer="label", reference="value", asks_for_tags=True
    ),
    "3dsrbench": _PLAIN("hunarbatra/3DSRBench", "test", task="task"),
    "3dsrbench_full": _PLAIN(
        "hunarbatra/3DSRBench-Full",
        "test",
        task="task",
        groupings={"view": Grouping()},
        cluster=Grouping(),
        is_shuffled=False,
    ),
    # The official evaluation: ids NAME, NAME-1 (choices rotated), NAME-flip, NAME-flip-1 (image mirrored).
    "3dsrbench_circular": Benchmark(
        "ccvl/3DSRBench",
        "test",
        data_file="3dsrbench_v1_vlmevalkit_circular.tsv",
        question="question",
        choice_columns=("A", "B", "C", "D"),
        lists_choices=True,
        task="category",
        groupings={
            "circular": Grouping(("qid",), r"-\d+$"),
            "flip": Grouping(("qid",), "-flip"),
            "flip_circular": Grouping(("qid",), r"-flip|-\d+$"),
        },
        cluster=Grouping(("qid",), r"-flip|-\d+$"),
    ),
    "lego": _PLAIN("hunarbatra/LEGO-Puzzles", "train", task="category"),
    "spatialreasoner": _PLAIN("hunarbatra/SpatialReasonerEval", "train", task="task"),
    "robospatial": Benchmark(
        "hunarbatra/RoboSpatial-Home", "train", images=("image", "depth_image"), choices="options", task="category"
    ),
    "robospatial_rgb": Benchmark("hunarbatra/RoboSpatial-Home", "train", choices="options", task="category"),
    "stvqa": Benchmark(
        "hunarbatra/STVQA-7K",
        "val",
        images=("images",),
        question="question_with_options",
        answer="answer_only",
        choices="options",
        task="category",
        prompt="problem",
        ground_truth="answer_option_text",
    ),
    "hallusionbench": Benchmark(
        "lmms-lab/HallusionBench",
        "image",
        question="question",
        answer="gt_answer",
        reference="flag",
        fixed_choices=("Yes", "No"),
        lists_choices=True,
        task="category",
        groupings={
            "question_pair": Grouping(("category", "subcategory", "set_id", "question_id")),
            "figure": Grouping(("category", "subcategory", "set_id", "figure_id")),
        },
        cluster=Grouping(("category", "subcategory", "set_id")),
        templates=(*QUESTION_TEMPLATES, "yes_no"),
    ),
    "mathvista": _PLAIN(
        "AI4Math/MathVista",
        "testmini",
        images=("decoded_image",),
        question="query",
        reference="choice_or_value",
    ),
    "mathvista_mcq": _PLAIN("hunarbatra/MathVista_MCQ", "testmini"),
    "mathverse": Benchmark("AI4Math/MathVerse", "testmini", "testmini", question="query_cot", reference="value"),
    "mathverse_vision_mcq": _PLAIN("hunarbatra/MathVerse_Vision_MCQ", "testmini"),
    "mathvision": Benchmark(
        "MathLLMs/MathVision",
        "test",
        images=("decoded_image",),
        question="question",
        reference="choice_or_value",
        choices="options",
        lists_choices=True,
    ),
    "sftseed": Benchmark("ydeng9/sft_seed", "train", images=("decoded_image",), question="problem", reference="value"),
    "emma-math": _PLAIN("hunarbatra/EMMA_MATH", "test", images=("image_1",), task="category"),
    "emma-chem": _emma("Chemistry"),
    "emma-code": _emma("Coding"),
    "emma-physics": _emma("Physics"),
    "mmmu_pro": Benchmark(
        "MMMU/MMMU_Pro",
        "test",
        "standard (4 options)",
        images=("image_1",),
        question="question",
        choices="options",
        lists_choices=True,
        task="topic_difficulty",
    ),
    "mmmu_pro_vision_only": _mmmu_vision(),
    "mmmu-pro-vision": _mmmu_vision(),
    "mmstar": Benchmark("Lin-Chen/MMStar", "val", question="question", has_choices_in_question=True, task="category"),
    "vstar": Benchmark(
        "lmms-lab/vstar-bench",
        "test",
        question="text",
        answer="label",
        has_choices_in_question=True,
        task="category",
    ),
    "mme-realworld-lite": Benchmark(
        "yifanzhang114/MME-RealWorld-lite-lmms-eval",
        "train",
        images=("bytes",),
        question="question",
        choices="multi-choice options",
        lists_choices=True,
        task="category",
    ),
    "mindcube-tiny": Benchmark(
        "MLL-Lab/MindCube",
        "MindCube_tinybench",
        archive="data.zip",
        images=("images",),
        max_images=8,
        question="question",
        answer="gt_answer",
        has_choices_in_question=True,
        task="type",
    ),
}
