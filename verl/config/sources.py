"""Sources of rows: what `data.train_files` and `data.val_files` name, and the share of each in a batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from verl.config.records import Config, SourceConfig

SOURCE_KEYS = ("data.train_files", "data.val_files")
COLUMN = "column"
"""A source's reward that is named by its rows, in their column `reward`."""
MAX_GAP = 1e-6
"""Difference of the sum of weights from 1 that is taken for rounding."""


def list_sources(files: str | Sequence[SourceConfig]) -> list[SourceConfig]:
    """The sources; one without a name for a path alone."""
    return [SourceConfig(path=files)] if isinstance(files, str) else list(files)


def name_source(source: SourceConfig) -> str:
    """The name of a source, or the last part of its path without its ending."""
    return source.name or Path(source.path.rpartition("@")[0] or source.path).stem


def share_prompts(sources: Sequence[SourceConfig], size: int) -> tuple[list[int], int]:
    """Prompts of each source in a batch of `size`, by the method of largest remainders; and those of all natural ones.

    A natural source has 0 of its own.
    """
    weights = [0.0 if source.weight == "natural" else float(source.weight) for source in sources]
    exact = [weight * size for weight in (*weights, max(0.0, 1 - sum(weights)))]
    counts = [int(share + MAX_GAP) for share in exact]
    ranked = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in ranked[: size - sum(counts)]:
        counts[index] += 1
    return counts[:-1], counts[-1]


def find_source_faults(config: Config, score_functions: Sequence[str] | None) -> Iterator[str]:
    """Faults of lists of sources: names, weights that do not add up, shares below one prompt, unknown rewards."""
    rewards = (*(score_functions or ()), *config.worker.reward.mixtures)
    for key in SOURCE_KEYS:
        files = getattr(config.data, key.removeprefix("data."))
        if isinstance(files, str):
            continue
        names = [name_source(source) for source in files]
        for name in {name for name in names if names.count(name) > 1}:
            yield f"{key}: two sources are called {name!r}; give each a name of its own (name: ...)"
        for name in names:
            if "/" in name or not name.isprintable() or not name:
                yield f"{key}: a source is called {name!r}; give it a name without '/' (name: ...)"
        for source, name in zip(files, names, strict=True):
            is_file = (source.reward or "").partition(":")[0].endswith(".py")
            if source.reward not in (None, COLUMN, *rewards) and not is_file and score_functions is not None:
                yield (
                    f"{key}, source {name}: reward = {source.reward!r}: must be one of {', '.join(rewards)}, "
                    f"FILE.py:NAME, or {COLUMN}"
                )
            path = (source.reward or "").rpartition(":")[0] or source.reward or ""
            if is_file and not Path(path).is_file():
                yield f"{key}, source {name}: reward = {source.reward!r}: there is no file {path}"
        if key == "data.train_files":
            yield from _weight_faults(config, files, names)


def _weight_faults(config: Config, files: Sequence[SourceConfig], names: Sequence[str]) -> Iterator[str]:
    weights = [float(source.weight) for source in files if source.weight != "natural"]
    total, has_natural = sum(weights), len(weights) < len(files)
    if not has_natural and abs(total - 1) > MAX_GAP:
        yield f"data.train_files: the weights add up to {total:g} and must add up to 1; change them"
        return
    if has_natural and total >= 1 - MAX_GAP:
        yield (
            f"data.train_files: the weights add up to {total:g} and leave nothing for natural sources; lower them to "
            "less than 1 together"
        )
        return
    size = config.data.mini_rollout_batch_size or config.data.rollout_batch_size
    for source, name, count in zip(files, names, share_prompts(files, size)[0], strict=True):
        if source.weight not in ("natural", 0) and not count:
            yield (
                f"data.train_files, source {name}: weight = {source.weight}: is less than one prompt of a batch of "
                f"{size}; raise it, or data.rollout_batch_size"
            )
        if source.weight != "natural" and source.repeat > 1:
            yield (
                f"data.train_files, source {name}: repeat = {source.repeat}: counts only with weight: natural; its "
                "weight says already how often it is drawn"
            )
