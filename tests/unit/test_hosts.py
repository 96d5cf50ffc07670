"""Machines of a run: what each lacks or has otherwise than the driver is named with it, before anything is loaded."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.distributed import groups, host_report
from verl.distributed.host_report import describe_host, digest_sources, find_name_fault
from verl.distributed.single_controller import ROOT
from verl.trainer import hosts
from verl.trainer.hosts import (
    PACKAGES,
    check_hosts,
    clock_gap,
    describe_gap,
    describe_gpus,
    network_environment,
    run_paths,
)

MACHINES = {"a" * 56: "left (10.0.0.1)", "b" * 56: "right (10.0.0.2)"}
LEFT, RIGHT = MACHINES


@pytest.fixture
def config(tmp_path) -> Any:
    for split in ("train", "val"):
        (tmp_path / f"{split}.parquet").write_text("rows")
    return load_config(
        [
            f"config={ROOT / 'configs' / 'toy_cpu.yaml'}",
            f"data.train_files={tmp_path / 'train.parquet'}",
            f"data.val_files={tmp_path / 'val.parquet'}",
            f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}",
            f"trainer.save_checkpoint_path={tmp_path / 'run'}",
        ]
    )


@pytest.fixture
def check(config, monkeypatch):
    """The faults, when the second machine's report has been changed by a function."""

    def call(change: Any, addresses: tuple[str, str] = ("10.0.0.1", "10.0.0.2")) -> str:
        def collect(arguments: tuple, machines: Any, env: Any) -> tuple[dict[str, Any], list[str]]:
            reports = {node: describe_host(*arguments) | {"name_fault": ""} for node in machines}
            reports[RIGHT] |= change(reports[RIGHT]) or {}
            return reports, []

        monkeypatch.setattr(hosts, "collect_reports", collect)
        monkeypatch.setattr(hosts, "addresses", lambda: dict(zip(MACHINES, addresses, strict=True)))
        try:
            check_hosts(config, MACHINES, {})
        except ConfigError as error:
            return "\n".join(error.faults)
        return ""

    return call


def test_machines_that_are_alike_pass_and_leave_nothing_in_the_run_folder(check, config):
    folder = Path(config.trainer.save_checkpoint_path)
    assert check(lambda report: None) == "" and not folder.exists()
    folder.mkdir()
    assert check(lambda report: None) == "" and not list(folder.iterdir())


def test_other_code_is_named_with_its_machine_and_files(check):
    name = "verl/algos/losses.py"
    message = check(lambda report: {"sources": report["sources"] | {name: "0"}})
    assert message.startswith(f"right (10.0.0.2): other code than on the driver's machine ({name});")
    assert "left" not in message
    assert "holds no sources of this project there" in check(lambda report: {"sources": {}})
    many = check(lambda report: {"sources": dict.fromkeys(report["sources"], "0")})
    assert f" and {len(digest_sources(ROOT)) - hosts.NAMED_FILES} more)" in many


def test_a_halved_learning_rate_in_one_machines_code_is_another_digest(tmp_path):
    for name in host_report.SOURCES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_sources(tmp_path) == digest_sources(ROOT)
    file = tmp_path / "verl" / "workers" / "fsdp_worker.py"
    file.write_text(file.read_text().replace("optim.lr * factor", "optim.lr * factor / 2"))
    there, here = digest_sources(tmp_path), digest_sources(ROOT)
    assert {name for name in here if here[name] != there[name]} == {"verl/workers/fsdp_worker.py"}


@pytest.mark.parametrize(("version", "words"), [("2.0.1", "torch 2.0.1, and "), (None, "torch none, and ")])
def test_another_version_of_a_package_is_named(check, config, version, words):
    def change(report: Any) -> Any:
        return {"versions": report["versions"] | {"torch": version}}

    assert check(change).startswith(f"right (10.0.0.2): {words}")
    config.trainer.__dict__["check_versions"] = False
    assert check(change) == ""


def test_other_files_under_the_same_path_are_named(check):
    key = "worker.actor.model.model_path"
    message = check(
        lambda report: {"files": report["files"] | {key: report["files"][key] | {"model.safetensors": "7 bytes"}}}
    )
    assert message == f"right (10.0.0.2): {key} holds other files than on the driver's machine (model.safetensors)"


def test_a_name_that_leads_to_the_machine_itself_counts_only_with_others(check, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    fault = find_name_fault()
    assert "127.0.1.1" in fault and "/etc/hosts" in fault and "GLOO_SOCKET_IFNAME" in fault
    assert check(lambda report: {"name_fault": fault}) == f"right (10.0.0.2): {fault}"
    assert check(lambda report: {"name_fault": fault}, addresses=("10.0.0.1", "10.0.0.1")) == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert find_name_fault() == ""


def test_clocks_an_hour_apart_are_told_and_end_nothing(check, capsys):
    assert check(lambda report: {"clock": time.time() + 3600}) == ""
    assert "Warning: right (10.0.0.2): its clock is 3600 s ahead of " in capsys.readouterr().out
    assert clock_gap(10.0, asked=4000.0, answered=4003.0) == -3990.0
    assert clock_gap(4002.0, asked=4000.0, answered=4003.0) == clock_gap(4050.0, asked=4000.0, answered=4003.0) == 0.0
    assert "its clock is 3990 s behind that of " in describe_gap(-3990.0)


def test_other_gpus_are_told(check, capsys):
    assert check(lambda report: {"gpus": ["H100", "H100"]}) == ""
    assert "Warning: the machines have other GPUs: left (10.0.0.1): " in capsys.readouterr().out
    assert describe_gpus(["H100", "H100", "H200"]) == "2 x H100, 1 x H200" and describe_gpus([]) == "no GPU"


@pytest.fixture
def report(config, monkeypatch):
    """This machine's own report on a run whose driver has written its mark."""
    folder = Path(config.trainer.save_checkpoint_path)
    folder.mkdir()
    (folder / "mark").write_text("mark")
    monkeypatch.setattr(host_report, "MARK_WAIT_S", 0.0)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return lambda: describe_host(str(ROOT), PACKAGES, str(folder), "mark", run_paths(config), [])["faults"]


def test_a_run_folder_of_its_own_or_none_is_named(report, config):
    folder = Path(config.trainer.save_checkpoint_path)
    assert report() == []
    (folder / "mark").unlink()
    assert "is another folder here than on the driver's machine; all machines must share it" in report()[0]
    folder.rmdir()
    assert report() == [f"trainer.save_checkpoint_path = {str(folder)!r} is not there; all machines must share it"]


def test_data_or_a_model_that_is_not_there_is_named_by_its_key(config, report, tmp_path):
    paths = run_paths(config)
    assert set(paths) == {"data.train_files", "data.val_files", "worker.actor.model.model_path"}
    (tmp_path / "mark").write_text("mark")
    gone = {key: f"{path}_gone" for key, path in paths.items()}
    faults = describe_host(str(ROOT), PACKAGES, str(tmp_path), "mark", gone, [])["faults"]
    assert faults == [f"{key} = {path!r} is not there" for key, path in gone.items()]


def test_a_full_disk_is_named(report, monkeypatch):
    def full(dir: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert [fault.partition(":")[0] for fault in report()] == [
        "trainer.save_checkpoint_path",
        "Ray's and temporary files",
    ]
    assert "(No space left on device, " in report()[0]


def test_rays_own_disk_is_tried_though_python_would_take_another(report, monkeypatch, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    make = host_report.tempfile.TemporaryFile

    def make_file(dir: Any) -> Any:
        if Path(dir) == disk:
            raise OSError(28, "No space left on device")
        return make(dir=dir)

    monkeypatch.setattr("tempfile.TemporaryFile", make_file)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(disk))
    (fault,) = report()
    assert fault.startswith(f"Ray's and temporary files: nothing can be written to {disk} (No space left on device, ")


ELSEWHERE = """
import pickle, sys
sys.modules["verl"] = None
answer = pickle.loads(sys.stdin.buffer.read())("/nowhere", ["torch"], "/nowhere", "mark", {}, [])
print(answer["sources"], answer["faults"][0])
"""


def test_a_machine_without_the_project_can_answer(monkeypatch):
    monkeypatch.setattr(host_report, "MARK_WAIT_S", 0.0)
    cloudpickle.register_pickle_by_value(host_report)
    sent = cloudpickle.dumps(describe_host)
    cloudpickle.unregister_pickle_by_value(host_report)
    answer = subprocess.run([sys.executable, "-c", ELSEWHERE], input=sent, capture_output=True, cwd="/")
    assert answer.stdout.startswith(b"{} trainer.save_checkpoint_path = '/nowhere' is not there"), answer.stderr


def test_network_variables_of_the_command_reach_the_workers(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = network_environment()
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE"} <= set(found) and "HF_TOKEN" not in found


@pytest.mark.parametrize(("with_nccl", "names"), [(True, "NCCL_SOCKET_IFNAME and GLOO_"), (False, "set GLOO_")])
def test_ranks_that_do_not_meet_name_variables_machine_and_cause(monkeypatch, with_nccl, names):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    with (
        pytest.raises(RuntimeError, match=r"^rank 1 of 2 on \S+ cannot talk to the others: meeting did") as caught,
        groups.naming_network(1, 2, "meeting", with_nccl, 5),
    ):
        raise RuntimeError("connection refused")
    message = str(caught.value)
    assert names in message and "connection refused" in message and "/etc/hosts" in message and "ray start" in message


def test_the_checkpoint_writers_group_names_its_network_too(monkeypatch):
    def refuse(**_: Any) -> None:
        raise RuntimeError("connectFullMesh failed")

    monkeypatch.setattr(groups.dist, "new_group", refuse)
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: 2)
    with pytest.raises(
        RuntimeError, match="checkpoint writers did not end .*connectFullMesh failed.*GLOO_SOCKET_IFNAME"
    ):
        groups.new_cpu_group()
