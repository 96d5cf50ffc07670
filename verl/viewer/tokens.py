"""The tokens of a response with their statistics, where the run recorded them."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

MAX_TOKENS = 8192
"""Tokens that are sent to the page."""


def read_tokens(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return [text, log-prob, ratio] of each token, and why a text is the id where it is one."""
    ids = row.get("token_ids") or []
    if not ids:
        return {"tokens": [], "note": ""}
    tokenizer, note = _load_tokenizer(folder)
    log_probs, ratios = (row.get(name) or [] for name in ("token_log_probs", "token_ratios"))
    texts = _decode(tokenizer, ids[:MAX_TOKENS])
    return {
        "tokens": [[text, _at(log_probs, place), _at(ratios, place)] for place, text in enumerate(texts)],
        "note": note,
    }


def _at(values: list[float | None], place: int) -> float | None:
    value = values[place] if place < len(values) else None
    return value if value is not None and math.isfinite(value) else None


def _decode(tokenizer: Any, ids: list[int]) -> list[str]:
    if tokenizer is None:
        return [f"{token} " for token in ids]
    return [tokenizer.decode([token], skip_special_tokens=False) if token >= 0 else "?" for token in ids]


@lru_cache(maxsize=4)
def _load_tokenizer(folder: Path) -> tuple[Any, str]:
    """Return the tokenizer of the model that the run's configuration names, or None and why."""
    try:
        config = json.loads((folder / "experiment_config.json").read_text(encoding="utf-8"))
        path = Path(config["worker"]["actor"]["model"]["model_path"]) / "tokenizer.json"
    except (OSError, ValueError, KeyError, TypeError):
        return None, "ids: experiment_config.json names no model"
    if not path.is_file():
        return None, f"ids: there is no {path}"
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)), ""
    except Exception as error:  # noqa: BLE001  # the only class that the package raises
        return None, f"ids: {path} cannot be read: {str(error)[:200]}"
