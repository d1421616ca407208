"""`_core.Forecast`: whether a request that starts would make started ones overflow, against a walk step by step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from kvpool import CacheConfig, KVCacheManager, PoolConfig
from kvpool._core import Forecast, Roster

T = 3
POOLS = 2


@dataclass
class Row:
    """A request as `start` is told of it."""

    length: int
    new: int
    produced: int
    most: list[int]
    held: list[int]
    back: list[int]

    def steps(self, share: float) -> int:
        return max(1, int(share * self.new + 0.5) - self.produced)

    def extra(self, pool: int, step: int) -> int:
        return max(0, min(-(-(self.length + step) // T), self.most[pool]) - self.held[pool])


def walk(rows: list[Row], share: float, available: list[int]) -> tuple[int, int, int] | None:
    """(pool, step, slots missing): step by step, slot by slot; the first pool that overflows, and when."""
    last = max(row.steps(share) for row in rows)
    for pool in range(POOLS):
        for step in range(1, last + 1):
            there = [row for row in rows if row.steps(share) >= step]
            back = sum(row.back[pool] for row in rows if row.steps(share) < step)
            missing = sum(row.extra(pool, step) for row in there) - available[pool] - back
            if missing > 0:
                return pool, step, missing
    return None


def empty(share: float) -> Forecast:
    pools = [PoolConfig(f"p{number}", 8) for number in range(POOLS)]
    manager = KVCacheManager(CacheConfig(T, pools, 1 << 12, max_seq_len=64), device=None)
    return Roster([manager._core]).forecast(share)


def draw(rng: random.Random) -> Row:
    length, new = rng.randint(1, 20), rng.randint(1, 15)
    held = [rng.randint(0, -(-length // T)) for _ in range(POOLS)]
    most = [count + rng.randint(0, 2) if rng.random() < 0.3 else 99 for count in held]
    return Row(length, new, rng.randint(0, new - 1), most, held, [rng.randint(0, count) for count in held])


@pytest.mark.parametrize("seed", range(20))
def test_start_adds_who_fits_and_leaves_no_trace_of_who_does_not(seed: int) -> None:
    rng = random.Random(seed)
    refused = added = 0
    for _ in range(30):
        share = rng.choice([0.25, 0.5, 1.0])
        forecast, rows = empty(share), list[Row]()
        for _ in range(8):
            row, available = draw(rng), [rng.randint(0, 14) for _ in range(POOLS)]
            given = (share, row.length, row.new, row.produced, row.most, row.held, row.back)
            if rng.random() < 0.2:  # has started whatever comes of it
                assert forecast.start(*given, None) is None
                rows.append(row)
                continue
            found, walked = forecast.start(*given, available), walk([*rows, row], share, available)
            assert (found is None) == (walked is None), (rows, row, available)
            if found is None or walked is None:
                rows.append(row)
                added += 1
                continue
            # It looks where a request ends, where most is missing of what there is until then.
            pool, step, missing = found
            assert pool == walked[0]
            assert step >= walked[1]
            there = sum(each.extra(pool, step) for each in [*rows, row] if each.steps(share) >= step)
            back = sum(each.back[pool] for each in [*rows, row] if each.steps(share) < step)
            assert missing == there - back - available[pool]
            refused += 1
    assert refused > 20
    assert added > 20
