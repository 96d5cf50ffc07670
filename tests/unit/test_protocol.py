"""DataProto: construction, selection, combination, storage."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from verl.protocol import (
    DataProto,
    DataProtoFuture,
    DataProtoItem,
    batch_collate,
    collate_fn,
    fold_batch_dim,
    pad_dataproto_to_divisor,
    union_numpy_dict,
    union_tensor_dict,
    unpad_dataproto,
)


def make(rows: int = 4, **meta) -> DataProto:
    """Row i holds [i, i] and the text of i."""
    return DataProto.from_dict(
        tensors={"ids": torch.arange(rows).unsqueeze(1).repeat(1, 2)},
        non_tensors={"text": [str(row) for row in range(rows)]},
        meta_info=meta or {"step": 1},
    )


def texts_only(rows: int = 4) -> DataProto:
    return DataProto.from_dict(non_tensors={"text": [str(row) for row in range(rows)]})


def rows_of(data: DataProto) -> list[int]:
    """The rows' numbers, the same in both parts."""
    texts = [int(text) for text in data.non_tensor_batch["text"]]
    assert data.batch is None or data.batch["ids"][:, 0].tolist() == texts
    return texts


class TestConstruction:
    def test_parts_may_be_missing(self):
        assert (len(DataProto()), len(texts_only(3)), len(DataProto.from_dict({"x": torch.zeros(2)}))) == (0, 3, 2)
        assert DataProto.from_dict(non_tensors={"x": [1]}).batch is None

    def test_the_callers_dictionaries_and_values_stay_as_they_are(self):
        images = [Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))]
        non_tensors, meta = {"ids": [[1, 2], [3, 4]], "images": images, "x": np.array([1.5, 2.5])}, {"a": 1}
        data = DataProto.from_dict(non_tensors=non_tensors, meta_info=meta)
        data.meta_info["b"] = 2
        assert meta == {"a": 1} and isinstance(non_tensors["x"], np.ndarray) and non_tensors["x"].dtype == float
        assert data.non_tensor_batch["ids"].shape == (2,) and data.non_tensor_batch["ids"][1] == [3, 4]
        assert data.non_tensor_batch["images"][0] is images[0]
        assert data.non_tensor_batch["x"].dtype == object

    @pytest.mark.parametrize(
        "arguments",
        [
            {"tensors": {"a": torch.zeros(2), "b": torch.zeros(3)}},
            {"tensors": {"a": torch.zeros(2)}, "non_tensors": {"b": [1, 2, 3]}},
            {"non_tensors": {"a": [1], "b": [1, 2]}},
            {"tensors": {"a": torch.zeros(2, 2)}, "num_batch_dims": 0},
            {"tensors": {"a": torch.zeros(2, 2)}, "num_batch_dims": 2},
            {"tensors": {"a": torch.zeros(2)}, "non_tensors": {"b": [1, 2]}, "num_batch_dims": 2},
            {"tensors": [torch.zeros(2)]},
        ],
    )
    def test_parts_that_do_not_fit_are_refused(self, arguments):
        with pytest.raises(AssertionError):
            DataProto.from_dict(**arguments)

    def test_one_dictionary_is_sorted_into_the_two_parts(self):
        data = DataProto.from_single_dict({"a": torch.zeros(2), "b": np.array(["x", "y"])}, {"step": 3})
        assert (
            list(data.batch.keys()) == ["a"] and list(data.non_tensor_batch) == ["b"] and data.meta_info == {"step": 3}
        )
        with pytest.raises(ValueError, match="b: must be a tensor or a numpy array, got list"):
            DataProto.from_single_dict({"b": [1, 2]})


class TestSelection:
    @pytest.mark.parametrize("make_batch", [make, texts_only])
    @pytest.mark.parametrize(
        ("index", "expected"),
        [
            (slice(1, 3), [1, 2]),
            (slice(None, None, 2), [0, 2]),
            (slice(None, None, -1), [3, 2, 1, 0]),
            ([2, 0, 0], [2, 0, 0]),
            ([-1], [3]),
            ([], []),
            ([True, False, False, True], [0, 3]),
            (np.array([3, 1]), [3, 1]),
            (np.array([False, True, False, False]), [1]),
            (torch.tensor([0, 2]), [0, 2]),
            (torch.tensor([], dtype=torch.long), []),
            (torch.tensor([True, True, False, False]), [0, 1]),
        ],
    )
    def test_rows(self, make_batch, index, expected):
        assert rows_of(make_batch()[index]) == expected

    def test_one_row(self):
        item = make()[np.int64(-1)]
        assert isinstance(item, DataProtoItem) and item.batch["ids"].tolist() == [3, 3]
        assert item.non_tensor_batch == {"text": "3"} and texts_only()[1].non_tensor_batch == {"text": "1"}
        with pytest.raises(IndexError, match="row 4 of a batch of 4"):
            make()[4]

    @pytest.mark.parametrize("index", ["ids", 1.0, None])
    def test_other_indices_are_refused(self, index):
        with pytest.raises(TypeError):
            make()[index]

    def test_indices_must_be_whole_and_booleans_complete(self):
        with pytest.raises(TypeError):
            make()[[0.5]]
        with pytest.raises(AssertionError, match="got 1 booleans for 4 rows"):
            make()[[True]]

    def test_keys(self):
        data = make(step=1, epoch=2)
        chosen = data.select(["ids", "missing"], [], ["epoch"])
        assert (
            list(chosen.batch.keys()) == ["ids"] and not chosen.non_tensor_batch and chosen.meta_info == {"epoch": 2}
        )
        assert chosen.batch["ids"].data_ptr() == data.batch["ids"].data_ptr()
        assert rows_of(data.select()) == [0, 1, 2, 3] and rows_of(texts_only().select(["ids"])) == [0, 1, 2, 3]

    def test_deepcopy_copies_objects_and_notes(self):
        data = DataProto.from_dict(non_tensors={"x": [[1]]}, meta_info={"list": [1]})
        deep, shallow = data.select(deepcopy=True), data.select()
        data.non_tensor_batch["x"][0].append(2)
        data.meta_info["list"].append(2)
        assert deep.non_tensor_batch["x"][0] == [1] and deep.meta_info == {"list": [1]}
        assert shallow.non_tensor_batch["x"][0] == [1, 2]

    def test_pop_takes_keys_out(self):
        data = make(step=1, epoch=2)
        taken = data.pop(["ids"], ["text", "missing"], ["epoch"])
        assert rows_of(taken) == [0, 1, 2, 3] and taken.meta_info == {"epoch": 2}
        assert len(data) == 4 and not list(data.batch.keys()) and not data.non_tensor_batch
        assert data.meta_info == {"step": 1}
        assert rows_of(texts_only().pop(non_tensor_batch_keys=["text"])) == [0, 1, 2, 3]

    def test_rename(self):
        assert list(make().rename("ids", "tokens").batch.keys()) == ["tokens"]
        two = DataProto.from_dict({"a": torch.zeros(1), "b": torch.ones(1)}).rename(["a", "b"], ["b", "a"])
        assert two.batch["b"].item() == 0 and two.batch["a"].item() == 1
        with pytest.raises(ValueError, match="2 old keys and 1 new"):
            make().rename(["ids", "x"], "tokens")
        with pytest.raises(TypeError):
            make().rename(3, "x")  # type: ignore[arg-type]


class TestCombination:
    def test_union_adds_keys_and_accepts_equal_ones(self):
        data = make(step=1)
        other = DataProto.from_dict({"scores": torch.ones(4), "ids": data.batch["ids"].clone()}, {"uid": list("abcd")})
        other.meta_info["epoch"] = 2
        assert data.union(other) is data
        assert set(data.batch.keys()) == {"ids", "scores"} and data.meta_info == {"step": 1, "epoch": 2}
        assert data.non_tensor_batch["uid"].tolist() == list("abcd")
        assert list(other.batch.keys()) == ["scores", "ids"]

    def test_union_works_without_tensors_on_either_side(self):
        assert rows_of(texts_only().union(DataProto.from_dict({"ids": make().batch["ids"]}))) == [0, 1, 2, 3]
        assert rows_of(make().union(DataProto.from_dict(non_tensors={"uid": list("abcd")}))) == [0, 1, 2, 3]
        assert rows_of(DataProto().union(make())) == rows_of(make().union(DataProto())) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("other", "error"),
        [
            (DataProto.from_dict({"new": torch.zeros(3)}), ValueError),
            (DataProto.from_dict({"new": torch.zeros(4), "ids": torch.zeros(4, 2)}), ValueError),
            (DataProto.from_dict({"new": torch.zeros(4)}, {"text": list("abcd")}), ValueError),
            (DataProto.from_dict({"new": torch.zeros(4)}, {"uid": list("abcd")}, {"step": 2}), AssertionError),
        ],
    )
    def test_a_union_that_fails_changes_nothing(self, other, error):
        data = make(step=1)
        with pytest.raises(error):
            data.union(other)
        assert list(data.batch.keys()) == ["ids"] and list(data.non_tensor_batch) == ["text"]
        assert data.meta_info == {"step": 1} and rows_of(data) == [0, 1, 2, 3]

    def test_union_compares_what_rows_hold(self):
        image = Image.new("RGB", (2, 2))
        one = DataProto.from_dict(non_tensors={"images": [[image]], "x": [np.array([1, 2])], "t": [torch.ones(2)]})
        same = DataProto.from_dict(non_tensors={"images": [[image]], "x": [np.array([1, 2])], "t": [torch.ones(2)]})
        assert len(one.union(same)) == 1
        with pytest.raises(ValueError, match="x is in both"):
            one.union(DataProto.from_dict(non_tensors={"x": [np.array([1, 3])]}))

    def test_the_parts_unions_make_new_dictionaries(self):
        data = make()
        tensors = union_tensor_dict(data.batch, DataProto.from_dict({"x": torch.ones(4)}).batch)
        arrays = union_numpy_dict(data.non_tensor_batch, {"x": np.ones(4)})
        assert set(tensors.keys()) == {"ids", "x"} and set(arrays) == {"text", "x"}
        assert list(data.batch.keys()) == ["ids"] and list(data.non_tensor_batch) == ["text"]

    @pytest.mark.parametrize("make_batch", [make, texts_only])
    def test_concat_undoes_chunk_and_split(self, make_batch):
        data = make_batch()
        for parts in (data.chunk(2), data.split(2), data.split(1)):
            assert rows_of(DataProto.concat(parts)) == [0, 1, 2, 3]
        assert [rows_of(part) for part in data.chunk(2)] == [[0, 1], [2, 3]]

    def test_concat_takes_parts_without_rows_and_refuses_parts_with_other_keys(self):
        assert rows_of(DataProto.concat([DataProto(), make(2), make()[[]]])) == [0, 1]
        assert len(DataProto.concat([DataProto(), DataProto()])) == 0
        with pytest.raises(AssertionError, match="not every part has ids"):
            DataProto.concat([texts_only(2), make(2)])
        with pytest.raises(AssertionError, match="not every part has text"):
            DataProto.concat([make(2), make(2).select(non_tensor_batch_keys=[])])
        with pytest.raises(IndexError):
            DataProto.concat([])

    def test_unequal_parts_are_refused(self):
        for cut in (lambda data: data.chunk(3), lambda data: data.split(3), lambda data: data.make_iterator(3, 1)):
            with pytest.raises(AssertionError):
                cut(make())

    def test_notes_are_never_shared(self):
        data = make(step=1)
        first, _ = data.chunk(2)
        others = [data[1:], data[[0]], data[0], data.select(), data.repeat(2), DataProto.concat([data]), first]
        for other in (*others, next(data.make_iterator(2, 1)), fold_batch_dim(data, 2)):
            other.meta_info["step"] = 2
        assert data.meta_info == {"step": 1}

    def test_repeat_and_reorder(self):
        assert rows_of(make(2).repeat(2)) == [0, 0, 1, 1]
        assert rows_of(make(2).repeat(2, interleave=False)) == [0, 1, 0, 1]
        for data in (make(3), texts_only(3)):
            assert data.reorder(torch.tensor([2, 0, 1])) is None
            assert rows_of(data) == [2, 0, 1]

    def test_iterator(self):
        plain = [rows_of(batch) for batch in make().make_iterator(2, epochs=2)]
        assert plain == [[0, 1], [2, 3], [0, 1], [2, 3]]
        shuffled = [
            [rows_of(batch) for batch in make(16).make_iterator(4, 2, seed, {"shuffle": True})] for seed in (0, 0, 1)
        ]
        assert shuffled[0] == shuffled[1] != shuffled[2]
        for epoch in (shuffled[0][:4], shuffled[0][4:]):
            assert sorted(sum(epoch, [])) == list(range(16))


class TestHelpers:
    @pytest.mark.parametrize(("rows", "divisor", "expected"), [(4, 2, []), (3, 4, [0]), (2, 7, [0, 1, 0, 1, 0])])
    def test_padding_repeats_the_head_and_is_undone(self, rows, divisor, expected):
        padded, pad_size = pad_dataproto_to_divisor(make(rows), divisor)
        assert rows_of(padded) == [*range(rows), *expected] and pad_size == len(expected)
        assert rows_of(unpad_dataproto(padded, pad_size)) == list(range(rows))
        with pytest.raises(AssertionError):
            pad_dataproto_to_divisor([1], 2)  # type: ignore[arg-type]

    def test_fold(self):
        folded = fold_batch_dim(make(), 2)
        assert folded.batch["ids"].shape == (2, 2, 2) and folded.non_tensor_batch["text"].tolist() == [
            ["0", "1"],
            ["2", "3"],
        ]

    def test_collate(self):
        data = make()
        assert rows_of(collate_fn([data[2], data[0]])) == [2, 0]
        assert rows_of(collate_fn([texts_only()[1]])) == [1]
        assert batch_collate([{"a": 1, "b": 2}, {"a": 3}]) == {"a": [1, 3], "b": [2]}

    def test_to_and_print_size(self, capsys):
        data = make()
        assert data.to("cpu") is data and len(texts_only().to("cpu")) == 4
        data.print_size("batch")
        assert capsys.readouterr().out == "batch tensors 0.000 GiB, non-tensors 0.000 GiB\n"

    def test_a_future_is_fetched_when_asked_for_and_chunks_come_out_of_the_collected_batch(self):
        fetched = []

        def fetch(handles):
            fetched.append(handles)
            return [make(handle) for handle in handles]

        future = DataProtoFuture.concat([2, 4], fetch)
        chunks = future.chunk(3)
        assert fetched == []
        texts = [chunk.get().non_tensor_batch["text"].tolist() for chunk in chunks]
        assert texts == [["0", "1"], ["0", "1"], ["2", "3"]] and len(future.get()) == 6
        assert chunks[2].chunk(2)[1].get().non_tensor_batch["text"].tolist() == ["3"]
        assert pickle.loads(pickle.dumps(chunks[0].dispatch_fn))(make(6)).non_tensor_batch["text"].tolist() == [
            "0",
            "1",
        ]


class TestStorage:
    def mixed(self) -> DataProto:
        tensors = {
            "bf16": torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16),
            "bool": torch.tensor([True, False]),
            "strided": torch.arange(6).reshape(3, 2).T,
            "wide": torch.zeros(2, 0),
        }
        images = [[Image.new("RGB", (3, 2), (1, 2, 3))], [Image.new("L", (1, 1), 7)]]
        non_tensors = {"images": images, "text": ["a", "b"], "ids": [[1], [2, 3]], "x": np.array([0.5, 1.5])}
        return DataProto.from_dict(
            tensors, non_tensors, {"step": 3, "rate": np.float32(0.5), "names": ["a"], "none": None}
        )

    def assert_same(self, left: DataProto, right: DataProto) -> None:
        assert set(left.batch.keys()) == set(right.batch.keys())
        for key in left.batch.keys():
            assert left.batch[key].dtype == right.batch[key].dtype and torch.equal(left.batch[key], right.batch[key])
        for key, values in left.non_tensor_batch.items():
            assert list(values) == list(right.non_tensor_batch[key])
        assert left.meta_info == right.meta_info

    def test_pickling_keeps_everything_and_leaves_the_original_alone(self):
        data = self.mixed()
        tensor = data.batch["strided"]
        self.assert_same(pickle.loads(pickle.dumps(data)), data)
        assert data.batch["strided"] is tensor
        assert rows_of(pickle.loads(pickle.dumps(texts_only()))) == [0, 1, 2, 3]
        assert len(pickle.loads(pickle.dumps(make().select([], [])))) == 4

    def test_a_batch_from_read_only_memory_can_be_written_to(self):
        buffers: list[pickle.PickleBuffer] = []
        state = pickle.dumps(make(), protocol=5, buffer_callback=buffers.append)
        memory = [bytes(buffer.raw()) for buffer in buffers]
        assert len(memory) == 1 and len(memory[0]) == 4 * 2 * 8
        restored = pickle.loads(state, buffers=memory)
        restored.batch["ids"] += 1
        assert pickle.loads(state, buffers=memory).batch["ids"][0, 0] == 0

    def test_disk(self, tmp_path):
        path = str(tmp_path / "batch.pt")
        self.mixed().save_to_disk(path)
        self.assert_same(DataProto.load_from_disk(path), self.mixed())
        texts_only().save_to_disk(path)
        assert rows_of(DataProto.load_from_disk(path)) == [0, 1, 2, 3]

    def test_loading_runs_no_code_and_saving_refuses_what_would_need_it(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (print, ("ran",))

        (tmp_path / "bad.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
        with pytest.raises(pickle.UnpicklingError):
            DataProto.load_from_disk(str(tmp_path / "bad.pt"))
        with pytest.raises(ValueError, match="x holds Payload"):
            DataProto.from_dict(non_tensors={"x": [Payload()]}).save_to_disk(str(tmp_path / "x.pt"))
