"""The benchmarks, one row each; a new benchmark is a new row.

The columns follow the data sets' own pages on the Hugging Face hub (https://huggingface.co/datasets/REPO).
"""

from functools import partial

from evaluation.benchmarks.benchmark import QUESTION_TEMPLATES, Benchmark, Grouping

_LMMS = "lmms-eval: tasks/"
_PAIR = {"pair": Grouping()}
_NUMBER_REQUEST = "Answer with a single number."
_VIDEO_FRAMES = 32
_REFSPATIAL = "VLMEvalKit: RefSpatialBench"
_POINT_REQUEST = (
    "Answer with a list of points [(x, y), ...], where x and y are fractions of the image's width and height, 0 to 1."
)
_BOX_REQUEST = (
    "Answer with the box [x1, y1, x2, y2] of the one object that fits this description, in pixels of the image, "
    "or with null if there is none."
)

_CHOICE_AND_BOX_REQUEST = "Answer with the choice, then its box [x1, y1, x2, y2] in pixels of the image."


def _cv_bench(config: str) -> Benchmark:
    row = partial(Benchmark, "nyu-visionx/CV-Bench", "test", config, choices="choices", task="task")
    return row(facts=("source",), rule="cv-bench", source=f"{_LMMS}cv_bench")


def _blink(config: str, num_images: int = 4) -> Benchmark:
    images = tuple(f"image_{i + 1}" for i in range(num_images))
    row = partial(Benchmark, "BLINK-Benchmark/BLINK", "val", config, images=images, choices="choices")
    return row(source="the data set's card")


def _emma(config: str) -> Benchmark:
    images = tuple(f"image_{i + 1}" for i in range(5))
    row = partial(Benchmark, "luckychao/EMMA", "test", config, images=images, question="question", context="context")
    return row(reference="choice_or_value", choices="options", lists_choices=True, source=f"{_LMMS}emma")


def _mmmu_vision() -> Benchmark:
    row = partial(Benchmark, "MMMU/MMMU_Pro", "test", "vision", question=None)
    return row(choices="options", lists_choices=True, templates=(*QUESTION_TEMPLATES, "vision"))


def _site(config: str, **form: int) -> Benchmark:
    row = partial(Benchmark, "franky-veteran/SITE-Bench", "test", config, images=("visual",), question="question")
    row = partial(
        row, choices="options", lists_choices=True, task="category", archives=("data_chunked_*.zip",), **form
    )
    return row(rule="chance-adjusted", source=f"{_LMMS}sitebench")


def _points(repo: str, split: str, **columns: str) -> Benchmark:
    row = partial(Benchmark, repo, split, answer=None, mask="mask", form="points", request=_POINT_REQUEST)
    return row(rule="mean score", **columns)  # type: ignore[arg-type]


def _spbench(name: str, max_images: int) -> Benchmark:
    row = partial(Benchmark, "hongxingli/SPBench", name, data_file=f"{name}.parquet", archives=(f"{name}-images.zip",))
    row = partial(row, images=("images",), media=f"{name}-images/{{scene_name}}/{{file}}", max_images=max_images)
    row = partial(row, question="question", answer="ground_truth", reference="choice_or_value", choices="options")
    row = partial(row, lists_choices=True, form="relative", request=_NUMBER_REQUEST, task="question_type")
    row = partial(row, revision="03611025a4e6032c558117c0e86b76c8b084c305", rule="vsi-bench")
    return row(
        source="github.com/ZJU-REAL/SpatialLadder, eval_spld/evaluator.py, which scores SPBench as VSI-Bench; that its"
        " copy of VSI-Bench's rule is the one used here: not confirmed"
    )


_PLAIN = partial(Benchmark, choices="choices")

BENCHMARKS: dict[str, Benchmark] = {
    "cv-bench": _cv_bench("default"),
    "cv-bench-2D": _cv_bench("2D"),
    "cv-bench-3D": _cv_bench("3D"),
    "blink-spatial": _blink("Spatial_Relation", 1),
    "blink-depth": _blink("Relative_Depth", 1),
    "blink-object": _blink("Object_Localization", 1),
    "blink-counting": _blink("Counting", 1),
    "blink-multi-view": _blink("Multi-view_Reasoning", 2),
    "blink-jigsaw": _blink("Jigsaw", 3),
    "blink-art-style": _blink("Art_Style"),
    "blink-forensic": _blink("Forensic_Detection"),
    "blink-functional": _blink("Functional_Correspondence"),
    "blink-iq": _blink("IQ_Test"),
    "blink-reflectance": _blink("Relative_Reflectance"),
    "blink-semantic": _blink("Semantic_Correspondence"),
    "blink-similarity": _blink("Visual_Similarity"),
    "blink-correspondence": _blink("Visual_Correspondence"),
    "realworld_qa": Benchmark(
        "visheratin/realworldqa", "test", question="question", reference="value", has_choices_in_question=True
    ),
    "spatialbench": Benchmark(
        "hunarbatra/SpatialBench",
        "train",
        question="text",
        reference="value",
        asks_for_tags=True,
        forms={"counting": "count"},
        task="category",
        groupings=_PAIR,
        rule="spatialbench",
        source="github.com/BAAI-DCAI/SpatialBot, eval_spatialbench.py",
    ),
    "mmvp": Benchmark(
        "hunarbatra/MMVP",
        "train",
        question="text",
        answer="label",
        reference="value",
        asks_for_tags=True,
        groupings=_PAIR,
        rule="mmvp",
        source="VLMEvalKit: report_acc_MMVP",
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
        rule="flip_circular",
        source=f"{_LMMS}3dsrbench, flip_circular_accuracy; EASI quotes a `Circular-Eval Accuracy` and does not say"
        " whether mirrors belong to its groups: not confirmed",
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
        "lmms-lab-encoder/HallusionBench",
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
        precision="precision",
        source="github.com/lupantech/MathVista, evaluation",
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
        images=tuple(f"image_{i + 1}" for i in range(7)),
        question="question",
        choices="options",
        lists_choices=True,
        named_images=r"<image (\d+)>",
        task="topic_difficulty",
        source=f"{_LMMS}mmmu_pro",
    ),
    "mmmu_pro_vision_only": _mmmu_vision(),
    "mmmu-pro-vision": _mmmu_vision(),
    "mmstar": Benchmark("Lin-Chen/MMStar", "val", question="question", has_choices_in_question=True, task="category"),
    "vstar": Benchmark(
        "lmms-lab-encoder/vstar-bench",
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
        archives=("data.zip",),
        images=("images",),
        max_images=8,
        question="question",
        answer="gt_answer",
        has_choices_in_question=True,
        task="type",
        facts=("id",),
        rule="mindcube",
        source="github.com/mll-lab-nu/MindCube; VLMEvalKit: mindcubebench.py",
    ),
    "vsi-bench": Benchmark(
        "nyu-visionx/VSI-Bench",
        "test",
        "full",
        revision="bdcadb3fea447621a828a24911801faba3587c12",
        images=(),
        archives=("arkitscenes.zip", "scannet.zip", "scannetpp.zip"),
        media="{dataset}/{scene_name}.mp4",
        frames=_VIDEO_FRAMES,
        question="question",
        answer="ground_truth",
        reference="choice_or_value",
        choices="options",
        lists_choices=True,
        form="relative",
        request=_NUMBER_REQUEST,
        task="question_type",
        cluster=Grouping(("dataset", "scene_name")),
        rule="vsi-bench",
        source=f"{_LMMS}vsibench",
    ),
    "mmsi-bench": Benchmark(
        "RunsenXu/MMSI-Bench",
        "test",
        images=("images",),
        max_images=10,
        question="question",
        has_choices_in_question=True,
        task="question_type",
        source=f"{_LMMS}mmsi_bench",
    ),
    "viewspatial": Benchmark(
        "oscarqjh/ViewSpatial_lmmseval",
        "test",
        images=("images",),
        max_images=8,
        question="question",
        choices="choices",
        lists_choices=True,
        task="question_type",
        source=f"{_LMMS}viewspatial",
    ),
    "site-image": _site("image_test", max_images=16),
    "site-video": _site("video_test", frames=_VIDEO_FRAMES),
    "embspatial": Benchmark(
        "FlagEval/EmbSpatial-Bench",
        "test",
        question="question",
        reference="index",
        choices="answer_options",
        lists_choices=True,
        task="relation",
        source=f"{_LMMS}embspatial",
    ),
    "erqa": Benchmark(
        "FlagEval/ERQA",
        "test",
        images=("images",),
        max_images=16,
        question="question",
        has_choices_in_question=True,
        task="question_type",
        source=f"{_LMMS}erqa",
    ),
    "omnispatial": Benchmark(
        "pangyyyyy/OmniSpatial",
        "test",
        archives=("image_files/**",),
        images=("image_path",),
        question="question",
        reference="index",
        choices="options",
        lists_choices=True,
        task="task_type",
        source="the data set's files: test-00000-of-00001.parquet, image_files/",
    ),
    "spar-bench": Benchmark(
        "jasonzhango/SPAR-Bench",
        "test",
        images=("image",),
        max_images=8,
        question="question",
        has_choices_in_question=True,
        form="relative",
        forms={"view_change_infer": "moves"},
        task="task",
        rule="mean over tasks",
        source=f"{_LMMS}sparbench",
    ),
    "spbench-si": _spbench("SPBench-SI", 1),
    "spbench-mv": _spbench("SPBench-MV", 16),
    "sat": Benchmark(
        "FlagEval/SAT",
        "test",
        images=("images",),
        max_images=8,
        question="question",
        answer="correct_answer",
        choices="answers",
        lists_choices=True,
        shuffles_choices=True,
        task="question_type",
        source="the columns of FlagEval/SAT as read by public loaders",
    ),
    "spatialviz": Benchmark(
        "PLM-Team/Spatial-Visualization-Benchmark",
        "test",
        images=(),
        archives=("images.zip",),
        media="{Category}/{Task}/{Level}/{Image_id}.png",
        question="Question",
        answer="Answer",
        choices="Choices",
        lists_choices=True,
        task="Task",
        source=f"{_LMMS}spatialviz",
    ),
    "refspatial-location": _points("BAAI/RefSpatial-Bench", "location", question="prompt", source=_REFSPATIAL),
    "refspatial-placement": _points("BAAI/RefSpatial-Bench", "placement", question="prompt", source=_REFSPATIAL),
    "refspatial-unseen": _points("BAAI/RefSpatial-Bench", "unseen", question="prompt", source=_REFSPATIAL),
    "where2place": _points(
        "FlagEval/Where2Place",
        "test",
        question="question",
        task="question_type",
        source="the columns as read by public loaders; the rule of RefSpatial",
    ),
    "robospatial-context": Benchmark(
        "chanhee-luke/RoboSpatial-Home",
        "context",
        images=("img",),
        answer=None,
        mask="mask",
        form="points",
        question="question",
        task="category",
        rule="mean score",
        source="VLMEvalKit: RoboSpatialHome",
    ),
    "groundingme": Benchmark(
        "lirang04/GroundingME",
        "groundingme",
        revision="78e3c7974b2b1db0ea52266969e40f664a38e330",
        data_file="groundingme.tsv",
        question="question",
        form="box",
        request=_BOX_REQUEST,
        reference="value",
        task="subtask_l1",
        rule="boxes",
        source="VLMEvalKit: vlmeval/dataset/GroundingME",
    ),
    "multihopspatial": Benchmark(
        "etri-vilab/MultihopSpatial",
        "test",
        data_file="data/multihop_test_4500.json",
        archives=("data/images/*",),
        images=("image_path",),
        media="data/images/{file}",
        question="question",
        has_choices_in_question=True,
        has_tags=True,
        box="bbox",
        request=_CHOICE_AND_BOX_REQUEST,
        task="hop",
        rule="multihop",
        source=f"{_LMMS}multihopspatial, which asks for fractions and takes a box beyond 1 for thousandths; the"
        " authors' evaluator for the files. Here a box beyond 1 is in pixels, as our prompts ask",
    ),
}

_BLINK = tuple(name for name in BENCHMARKS if name.startswith("blink-"))

SUITES: dict[str, dict[str, tuple[str, ...]]] = {
    "easi8": {
        "VSI-Bench": ("vsi-bench",),
        "MMSI-Bench": ("mmsi-bench",),
        "MindCube-tiny": ("mindcube-tiny",),
        "ViewSpatial": ("viewspatial",),
        "SITE": ("site-image", "site-video"),
        "BLINK": _BLINK,
        "3DSRBench": ("3dsrbench_circular",),
        "EmbSpatial": ("embspatial",),
    },
}
"""Leaderboards: one name for several benchmarks, whose rows are taken together line by line.

EASI: https://github.com/EvolvingLMMs-Lab/EASI, docs/Support_bench_models.md.
"""
