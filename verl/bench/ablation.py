"""`python -m verl.bench ablation --config FILE [a.b=value ...]`: ablation of the trainer's optimizations.

Every row is a run of `verl.bench step` in its own processes, with one optimization disabled.
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AS_CONFIGURED = "as configured"
UNDONE = {
    "prompts and images repeated": ("worker.actor.shared_prompt=false", "worker.actor.images_once=false"),
    "no activations kept": ("worker.actor.model.activation_budget_gb=0",),
    "layers not fused": ("worker.actor.model.use_fused_layers=false",),
    "prompts read by every sample": ("worker.rollout.shared_prompt=false",),
    "scheduled by vLLM": ("worker.rollout.fast_scheduler=false",),
    "no CUDA graphs": ("worker.rollout.enforce_eager=true",),
    "offloaded as released": (
        "worker.actor.offload.offload_params=true",
        "worker.actor.offload.offload_optimizer=true",
        "worker.ref.fsdp.enable_cpu_offload=true",
    ),
}
"""Row name -> config overrides that disable an optimization; later overrides take precedence."""
COLUMNS = ("rollout", "old", "reference", "update", "whole step")
"""Phases with a column of seconds."""


def run_ablation(step: Sequence[str], names: Sequence[str], dump: str | None = None) -> int:
    """Runs the unchanged configuration and rows of UNDONE, prints the table, and returns 2 if any of them failed.

    `step` are arguments of `verl.bench step` for all rows. If the first row fails, the others are not run. The file
    `dump` holds each row's own --dump or its fault, and is rewritten after each row.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in (AS_CONFIGURED, *names):
        print(f"{name} ...", flush=True)
        results[name] = _run_row([*step, *UNDONE.get(name, ())])
        if dump:
            Path(dump).write_text(json.dumps(results, indent=1))
        if fault := results[name].get("fault"):
            print(fault, flush=True)
            if name == AS_CONFIGURED:
                return 2
    print("\n".join(["", *format_rows(results)]))
    return 2 if any("fault" in result for result in results.values()) else 0


def _run_row(step: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        command = [sys.executable, "-m", "verl.bench", "step", *step, "--ratio_groups", "0", "--dump", str(file)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode or not file.exists():
            return {"fault": f"ended with code {done.returncode}:\n{done.stdout[-2000:]}"}
        return json.loads(file.read_text())


def format_rows(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line per row: seconds, step time relative to the first row, and peak GPU memory."""
    width = max(map(len, results)) + 1
    lines = [f"{'seconds':{width}s}" + "".join(f"{column:>14s}" for column in (*COLUMNS, "times", "peak GiB"))]
    whole = results[AS_CONFIGURED]["table"]["whole step"]["seconds"]
    for name, result in results.items():
        if "fault" in result:
            lines.append(f"{name:{width}s}  failed")
            continue
        seconds = [result["table"][column]["seconds"] for column in COLUMNS]
        row = (*seconds, seconds[-1] / whole, result["table"]["whole step"]["peak_gib"])
        lines.append(f"{name:{width}s}" + "".join(f"{value:14.2f}" for value in row))
    return lines
