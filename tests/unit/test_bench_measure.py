"""A benchmark of several GPUs gives each of them the load of one."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.bench import decode, inputs, setting
from verl.bench.inputs import draw_lengths, lognormal
from verl.bench.measure import GpuMemory, add_times, main
from verl.bench.passes import Shape, parse_shape, random_groups, share_groups
from verl.bench.setting import scale_load
from verl.config.loading import load_config
from verl.data import dataset
from verl.protocol import DataProto

CONFIGS = Path(__file__).parents[2] / "configs"
TOY = str(CONFIGS / "bench_toy_cpu.yaml")
FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_every_gpu_has_the_load_of_one(num_gpus):
    chosen = [f"config={CONFIGS / 'bench_toy_cpu.yaml'}", *FILES, "data.mini_rollout_batch_size=4"]
    chosen.append(f"worker.actor.model.model_path={CONFIGS / 'toy_model'}")
    one = load_config(chosen)
    scaled = load_config([*chosen, *scale_load(one, num_gpus)])
    assert scaled.num_ranks == num_gpus
    for name in ("rollout_batch_size", "mini_rollout_batch_size", "val_batch_size"):
        assert getattr(scaled.data, name) == num_gpus * getattr(one.data, name)
    assert scaled.worker.actor.global_batch_size == num_gpus * one.worker.actor.global_batch_size
    assert scaled.worker.actor.micro_batch_size_per_device_for_update == (
        one.worker.actor.micro_batch_size_per_device_for_update
    )
    again = load_config([*chosen, *scale_load(scaled, 1)])  # from any number of GPUs to any other
    assert again == one


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("{", "Expecting"), ("[]", "list indices"), ('{"as configured": {}}', "table")],
)
def test_a_table_to_compare_with_is_read_before_anything_is_measured(tmp_path, capsys, text, words):
    other = tmp_path / "one.json"
    if text is not None:
        other.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["step", "--config", TOY, "--against", str(other)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "one.json is not what" in said and words in said


def test_a_configuration_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["step", "--config", "no_such.yaml"])
    assert caught.value.code == 2 and "no_such.yaml: there is no such file" in capsys.readouterr().err


def test_a_dump_has_a_folder_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["ablation", "--config", TOY, "--dump", str(tmp_path / "new" / "rows.json")])
    assert "there is no folder" in capsys.readouterr().err


def test_times_are_multiples_of_the_other_tables():
    table = {"rollout": {"seconds": 3.0}, "sleep": {"seconds": 0.1}}
    table["update"] = {"seconds": 4.0}
    add_times(table, {"rollout": {"seconds": 2.0}, "sleep": {"seconds": 0.0}})  # of a rollout alone
    assert table["rollout"]["times"] == 1.5 and table["sleep"]["times"] is table["update"]["times"] is None


@pytest.mark.parametrize(("visible", "expected_gb"), [("2,3", 7.0), (None, 70.0)])
def test_the_peak_is_that_of_the_runs_own_gpus(tmp_path, monkeypatch, visible, expected_gb):
    """Beside other runs of the machine: a stand-in for nvidia-smi tells of 7 GiB on GPUs 2 and 3, of 70 on any."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=2,3*) echo 7168;; *) echo 71680;; esac\nexec sleep 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    memory = GpuMemory()
    memory.start()
    deadline = time.monotonic() + 30
    while not memory.samples and time.monotonic() < deadline:
        time.sleep(0.01)
    assert memory.peak([(0.0, time.perf_counter())]) == expected_gb


def test_drawn_lengths_have_one_sum_and_the_named_distribution():
    logs = lognormal("lognormal:330:0.6")
    first, second = (draw_lengths(logs, (128, 8), 2048, seed) for seed in (1, 2))
    assert first.sum() == second.sum() and (first != second).any()
    assert (first == draw_lengths(logs, (128, 8), 2048, 1)).all()
    assert np.median(first) == pytest.approx(330, abs=1) and first.mean() == pytest.approx(395, abs=2)
    assert np.log(first).std() == pytest.approx(0.6, rel=0.01)
    assert draw_lengths(logs, (128, 8), 400, 0).max() == 400
    assert set(draw_lengths(lognormal("lognormal:9:0"), (2, 2), 400, 0).flat) == {9}
    assert draw_lengths(lognormal("lognormal:1:3"), (128, 8), 400, 0).min() == 1


@pytest.mark.parametrize(
    "text", ["lognormal", "lognormal:0:1", "lognormal:330", "normal:330:1", "lognormal:9:-1", "lognormal:nan:1"]
)
def test_lengths_that_are_no_distribution_are_named(capsys, text):
    with pytest.raises(SystemExit):
        main(["step", "--config", TOY, "--lengths", text])
    assert f"{text} is not lognormal:MEDIAN:SIGMA" in capsys.readouterr().err


def test_shapes_share_the_tokens_of_the_first():
    """192 + 8 x 64 = 704 tokens a group; 4 groups of them, and as many tokens of the others on each of two ranks."""
    shapes = [parse_shape(text) for text in ("192:64:8", "896:64:8", "192:64:16", "9999:64:8")]
    assert [shape.tokens for shape in shapes] == [704, 1408, 1216, 10511]
    assert share_groups(shapes, 4, 2) == [8, 4, 4, 2]


@pytest.mark.parametrize("text", ["", "1586:400", "1586:400:8:1", "1586:0:8", "a:b:c"])
def test_a_shape_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["passes", "--config", "configs/bench_toy_cpu.yaml", "--shape", text])
    assert f"{text} is not PROMPT:RESPONSE:N" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["step", "--config", "configs/bench_toy_cpu.yaml", "--shape", "128:64:8"])
    assert "--shape is of passes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["step", "--config", "configs/bench_toy_cpu.yaml", "--shared_only"])
    assert "--shared_only is of passes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["step", "--config", "configs/bench_toy_cpu.yaml", "--kernels"])
    assert "--kernels is of passes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "8.5", "all"])
def test_sequences_of_a_decode_step_are_counted(text, capsys):
    with pytest.raises(SystemExit):
        main(["rollout", "--config", "configs/bench_toy_cpu.yaml", f"--rows={text}"])
    assert f"{text} is no number of sequences; it is at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["step", "--config", "configs/bench_toy_cpu.yaml", "--rows", "8"])
    assert "--rows is of rollouts" in capsys.readouterr().err


class Clock:
    """Engines whose steps take a millisecond and one for every ten rows, after half a second for the prompts."""

    def __init__(self, num_engines, monkeypatch):
        self.now, self.group, self.asked = 0.0, [None] * num_engines, []
        monkeypatch.setattr(decode.time, "perf_counter", lambda: self.now)

    def awake(self):
        return nullcontext()

    def generate(self, prompts, sampling, seed):
        limits = prompts.non_tensor_batch["max_tokens"]
        rows = limits.size // len(self.group)
        self.asked.append((len(prompts), sampling["n"], limits.max()))
        self.now += 0.5 + 0.001 * limits.max() * (1 + rows / 10)


def test_decode_steps_are_what_longer_rollouts_take_more(monkeypatch):
    prompts = DataProto.from_dict(tensors={"ids": torch.zeros(8, 2)})
    config = load_config([f"config={TOY}", *FILES, "data.max_response_length=64"])
    for num_engines in (1, 2):
        engines = Clock(num_engines, monkeypatch)
        batches = SimpleNamespace(upcoming=lambda: prompts)
        trainer = SimpleNamespace(config=config, batches=batches, engines=engines)
        table = decode.time_decode(trainer, [1, 4, 20])
        assert [row["rows"] for row in table] == [1, 4, 16]
        assert [row["step_ms"] for row in table] == pytest.approx([1.1, 1.4, 2.6])
        assert table[2]["tokens_per_s"] == pytest.approx(16 / 0.0026)
        assert engines.asked[::3] == [(num_engines, 1, 16), (num_engines, 4, 16), (2 * num_engines, 8, 16)]
        with pytest.raises(
            SystemExit, match=f"--rows 65: an engine has {64 // num_engines} sequences and writes 256 at"
        ):
            decode.time_decode(trainer, [65])
    few = [f"config={TOY}", *FILES, "worker.rollout.max_num_seqs=16"]
    for changed, words in ((few, "writes 16 at a time"), ([*few, "data.max_response_length=1"], "raise it to 2")):
        trainer.config = load_config(changed)
        with pytest.raises(SystemExit, match=words):
            decode.time_decode(trainer, [17])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--against", "one.json"], "--against is of steps"),
        (["--frames", "-1"], "--frames -1: a video has at least one frame"),
    ],
)
def test_what_passes_do_not_read_is_refused(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("one.json").write_text('{"table": {"update": {}}}')
    with pytest.raises(SystemExit):
        main(["passes", "--config", TOY, *words])
    assert told in capsys.readouterr().err


def test_responses_of_passes_have_the_lengths_that_are_asked_for(monkeypatch):
    def collate(prompts, _):
        return DataProto.from_dict(tensors={"prompt_ids": torch.zeros(len(prompts), 4)})

    monkeypatch.setattr(dataset, "collate_prompts", collate)
    prompts = [SimpleNamespace(ids=torch.arange(9))] * 3
    even, drawn = (
        random_groups(Shape(4, 30, 2), prompts, 0, lengths).batch["response_mask"]
        for lengths in (None, lognormal("lognormal:10:0.6"))
    )
    assert even.shape == drawn.shape == (3, 2, 30) and even.all()
    lengths = drawn.sum(-1)
    assert drawn.equal(torch.arange(30) < lengths.unsqueeze(-1))
    assert 1 <= lengths.min() < lengths.max() <= 30 and len(lengths.unique()) > 3


def test_a_prompt_shorter_than_its_picture_is_refused_before_anything_loads(tmp_path, monkeypatch):
    """A picture of 112 x 112 in a prompt of 12 tokens, beside one of 128."""
    monkeypatch.setattr(setting, "FOLDER", tmp_path)
    words = "passes --config configs/bench_toy_cpu.yaml --image 112x112 --shape 12:8:4 --shape 128:8:4".split()
    with pytest.raises(SystemExit, match="the image alone takes [0-9]+ of a prompt's 12 tokens; make it longer"):
        main(words)


def test_a_tokenizer_that_cannot_fill_prompts_to_a_length_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(setting, "FOLDER", tmp_path)
    monkeypatch.setattr(inputs, "FILLER", " qzxjv")
    with pytest.raises(SystemExit, match="with the word 'qzxjv', of which this model's tokenizer makes [2-9]"):
        main(["passes", "--config", TOY, "--image", "112x112"])
