"""Several sources as one data set, and the order of its batches, in which each source has its share."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from verl.config.records import SourceConfig
from verl.config.sources import name_source, share_prompts
from verl.data.dataset import BatchOrder, Prompt, RLHFDataset


class MixedSet(RLHFDataset):
    """The prompts of several sets, one behind the other.

    Args:
        sets: one for each source.
        sources: their weights and repeats.
    """

    def __init__(self, sets: Sequence[RLHFDataset], sources: Sequence[SourceConfig]):
        self.sets, self.sources = sets, sources
        self.processor, self.on_bad_row = sets[0].processor, sets[0].on_bad_row
        self.starts = np.cumsum([0, *map(len, sets)])
        self.entries = [entry for each in sets for entry in each.entries]
        self.faults, self.left_out = {}, set()

    @property
    def layout(self) -> list[list[object]]:
        """Facts beside the rows that the order of batches follows from."""
        return [
            [len(each), source.weight, source.repeat] for each, source in zip(self.sets, self.sources, strict=True)
        ]

    def locate(self, index: int) -> tuple[RLHFDataset, int]:
        """The set that holds a prompt, and its place there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sets[number], index - int(self.starts[number])

    def _find_fault(self, index: int) -> str:
        own, place = self.locate(index)
        return own._find_fault(place)

    def read(self, index: int, is_resized: bool = True, has_videos: bool = True) -> Prompt:
        own, place = self.locate(index)
        return own.read(place, is_resized, has_videos)

    def digest_videos(self, index: int) -> list[bytes]:
        own, place = self.locate(index)
        return own.digest_videos(place)

    def rows_of(self, number: int) -> np.ndarray:
        """Indices of a source's prompts."""
        return np.arange(self.starts[number], self.starts[number + 1])


class MixedOrder:
    """Order of batches in which every pool of rows has its number of prompts; a function of seed and batch alone.

    A pool is gone through in permutations, one after the other, however short it is. Sources with a weight are a pool
    each, natural ones make one together.

    Args:
        pools: row indices, and the prompts of a batch that they give.
        shuffle: False goes through each pool in its order.
        seed: of the permutations.
    """

    def __init__(self, pools: Sequence[tuple[np.ndarray, int]], shuffle: bool, seed: int):
        self.pools, self.shuffle, self.seed = [pool for pool in pools if pool[1]], shuffle, seed
        self.batch_size = sum(count for _, count in pools)
        self._permuted = lru_cache(maxsize=2 * len(pools))(self._permute)

    def _permute(self, number: int, epoch: int) -> np.ndarray:
        rows = self.pools[number][0]
        return np.random.default_rng((self.seed, epoch, number)).permutation(rows) if self.shuffle else rows

    def parts(self, batch: int) -> list[tuple[list[int], list[int]]]:
        """For each pool its rows in batch number `batch`, and the pool's other rows, which replace bad ones."""
        parts = []
        for number, (rows, count) in enumerate(self.pools):
            drawn = range(batch * count, (batch + 1) * count)
            chosen = [int(self._permuted(number, place // len(rows))[place % len(rows)]) for place in drawn]
            epoch, place = divmod(drawn.stop, len(rows))
            spares = [row for row in np.roll(self._permuted(number, epoch), -place).tolist() if row not in chosen]
            parts.append((chosen, spares))
        return parts

    def mix(self, batch: int, parts: Sequence[Sequence[int]]) -> list[int]:
        """The rows of all pools in an order that spreads every pool over the batch."""
        rows = [row for part in parts for row in part]
        return np.random.default_rng((self.seed, batch)).permutation(rows).tolist() if self.shuffle else rows


def build_order(rows: RLHFDataset, size: int, shuffle: bool, seed: int) -> BatchOrder | MixedOrder:
    """The order of batches of a data set.

    Raises:
        DataError: fewer rows than a batch.
    """
    if not isinstance(rows, MixedSet) or len(rows.sets) == 1 and rows.sources[0].repeat == 1:
        return BatchOrder(len(rows), size, shuffle, seed)
    counts, num_natural = share_prompts(rows.sources, size)
    pools = [(rows.rows_of(number), count) for number, count in enumerate(counts)]
    natural = [
        np.tile(rows.rows_of(number), source.repeat)
        for number, source in enumerate(rows.sources)
        if source.weight == "natural"
    ]
    if natural:
        pools.append((np.concatenate(natural), num_natural))
    return MixedOrder(pools, shuffle, seed)


def describe_shares(rows: MixedSet, size: int, num_steps: int) -> list[str]:
    """A line on each source: its prompts, its share of a batch, and how often each is drawn."""
    counts, num_natural = share_prompts(rows.sources, size)
    num_rows = [len(each) * source.repeat for each, source in zip(rows.sets, rows.sources, strict=True)]
    total = sum(number for number, source in zip(num_rows, rows.sources, strict=True) if source.weight == "natural")
    lines = []
    for own, source, count, number in zip(rows.sets, rows.sources, counts, num_rows, strict=True):
        share = num_natural * number / total if source.weight == "natural" else count
        times = share * num_steps / len(own)
        again = f"; it is smaller than its share, so that each is drawn {times:.1f} times" if times > 1 else ""
        lines.append(f"Source {name_source(source)}: {len(own)} prompts, {share:g} of {size} in a batch{again}")
    return lines
