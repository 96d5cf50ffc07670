import json

import pytest

from spatialthinker.geometry import Box
from spatialthinker.scene_graph import MAX_SCENE_CHARS, SceneFormatError, label_of, load_scene, parse_scene

CAT = {"id": "cat.1", "bbox": [1, 2.5, 30, 40]}
LIGHT = {"id": "Traffic_light.12", "bbox": [0, 0, 9, 9]}
RELATION = {"subject": "cat.1", "predicate": "left of", "object": "Traffic_light.12"}


def text_of(*objects, relations=(), **more):
    return json.dumps({"objects": objects, "relationships": relations, **more})


def test_a_scene_by_rows_and_columns():
    scene = load_scene(text_of(CAT, LIGHT, relations=[RELATION]))
    assert scene.ids == ["cat.1", "Traffic_light.12"]
    assert scene.objects[0].box == Box(1.0, 2.5, 30.0, 40.0)
    assert [item.label for item in scene.objects] == ["cat", "traffic light"]
    (relation,) = scene.relations
    assert (relation.subject, relation.predicate, relation.object) == ("cat.1", "left of", "Traffic_light.12")


@pytest.mark.parametrize(
    "text",
    [
        text_of(),
        text_of(CAT),
        '{"objects": []}',
        '{"relationships": []}',
        '{"note": "no objects"}',
        text_of(CAT, note={"deep": [1, 2]}),
        text_of(CAT, relations=[RELATION | {"confidence": 0.5}]),
        text_of(CAT, relations=[RELATION | {"subject": "not_among_the_objects.9"}]),
        text_of(CAT, relations=[RELATION | {"predicate": ""}]),
        text_of({"id": "a.0001", "bbox": [-5, -5, 1e6, 1e6]}),
        " \n\t" + text_of(CAT) + "\n",
        text_of({"id": "a.1", "bbox": [5, 5, 1, 1]}),  # swapped corners are the spatial term's business
    ],
)
def test_well_formed(text):
    assert parse_scene(text) is not None


def test_a_missing_list_of_objects_is_remembered():
    assert not load_scene('{"relationships": []}').has_objects_key
    assert load_scene('{"objects": []}').has_objects_key


def with_box(box):
    return f'{{"objects": [{{"id": "a.1", "bbox": {box}}}]}}'


def with_id(name):
    return json.dumps({"objects": [{"id": name, "bbox": [1, 2, 3, 4]}]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "missing_scene"),
        ("x" * (MAX_SCENE_CHARS + 1), "scene_too_long"),
        ("", "scene_not_json"),
        ("```json\n" + text_of(CAT) + "\n```", "scene_not_json"),
        (text_of(CAT)[:-1], "scene_not_json"),
        (text_of(CAT) + " done", "scene_not_json"),
        ("{'objects': []}", "scene_not_json"),
        ("[" * 10_000, "scene_not_object"),
        ('{"a":' * 6_000, "scene_not_json"),
        ('{"objects": [], "note": "\ud800"}', "scene_not_json"),
        (with_box("[1, 2, 3, NaN]"), "scene_not_json"),
        (with_box("[1, 2, 3, Infinity]"), "scene_not_json"),
        ("{}", "scene_not_object"),
        ("[]", "scene_not_object"),
        ("null", "scene_not_object"),
        ("[" + text_of(CAT) + "]", "scene_not_object"),
        ('{"objects": {"a": 1}}', "objects_not_list"),
        ('{"objects": null}', "objects_not_list"),
        ('{"objects": [3]}', "bad_object"),
        ('{"objects": [[]]}', "bad_object"),
        ('{"objects": [{"id": "a.1"}]}', "bad_object"),
        (text_of(CAT | {"label": "x"}), "bad_object"),
        (with_id(7), "bad_id"),
        (with_id("cat"), "bad_id"),
        (with_id(".1"), "bad_id"),
        (with_id("cat."), "bad_id"),
        (with_id("dog2.1"), "bad_id"),
        (with_id("hot dog.1"), "bad_id"),
        (with_id("traffic-light.1"), "bad_id"),
        (with_id("cat.1\n"), "bad_id"),
        (with_id("cat.1\ndog.2"), "bad_id"),
        (with_id("cat.1.2"), "bad_id"),
        (text_of(CAT, CAT), "duplicate_id"),
        (with_box("[1, 2, 3]"), "bad_box"),
        (with_box("[1, 2, 3, 4, 5]"), "bad_box"),
        (with_box('[1, 2, 3, "4"]'), "bad_box"),
        (with_box("[1, 2, 3, null]"), "bad_box"),
        (with_box("[1, 2, 3, true]"), "bad_box"),
        (with_box('"1234"'), "bad_box"),
        (with_box('{"a": 1, "b": 2, "c": 3, "d": 4}'), "bad_box"),
        (with_box("[1, 2, 3, 1e999]"), "bad_number"),
        (with_box("[1, 2, 3, -1e7]"), "bad_number"),
        (with_box(f"[1, 2, 3, {'9' * 30}]"), "bad_number"),
        (with_box(f"[1, 2, 3, {'9' * 5000}]"), "bad_number"),
        ('{"relationships": {}}', "relationships_not_list"),
        (text_of(CAT, relations=["cat.1 on cat.1"]), "bad_relation"),
        (text_of(CAT, relations=[{"subject": "a.1", "object": "b.2"}]), "bad_relation"),
        (text_of(CAT, relations=[RELATION | {"predicate": 3}]), "bad_relation"),
        (text_of(CAT, relations=[RELATION | {"object": "the cat"}]), "bad_relation"),
    ],
)
def test_reasons(text, reason):
    with pytest.raises(SceneFormatError) as caught:
        load_scene(text)
    assert caught.value.reason == reason
    assert parse_scene(text) is None


def test_reference_scenes_may_use_any_label():
    text = text_of(CAT | {"id": "traffic light-2.1", "label": "x"}, CAT, CAT, relations=[RELATION | {"subject": "it"}])
    assert parse_scene(text) is None
    scene = load_scene(text, is_reference=True)
    assert scene.objects[0].label == "traffic light 2"
    with pytest.raises(SceneFormatError):
        load_scene(with_box("[1, 2, 3, true]"), is_reference=True)


def test_label_of():
    assert label_of("Fire_hydrant.3") == "fire hydrant"
    assert label_of("t-shirt.1.2") == "t shirt"
    assert label_of("word") == "word"


@pytest.mark.parametrize("blank", ["\xa0", "\f", "\v", "\u2003", "\u2028", "\x85", "\x1c", " \n\t", "\u3000\xa0\r\n"])
def test_blanks_of_any_kind_around_a_scene_do_not_count(blank):
    text = '{"objects": [{"id": "cat.1", "bbox": [1, 2, 3, 4]}]}'
    assert load_scene(blank + text + blank) == load_scene(text)
    assert load_scene(blank + text, is_reference=True) == load_scene(text, is_reference=True)
    with pytest.raises(SceneFormatError, match="the JSON object is empty"):
        load_scene(f"{blank}{{}}{blank}")
    with pytest.raises(SceneFormatError, match="scene_not_json"):
        load_scene(text.replace(": [{", ": \xa0[{"))  # inside, JSON's own blanks alone count
