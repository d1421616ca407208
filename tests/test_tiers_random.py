"""Random runs on two small tiers against the reference model: promises of batches, and the events of a whole run.

tests/test_model_random.py compares everything else, on one tier and on two. `KVPOOL_SEED=n` runs one seed alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import backend
from domains import OPERATIONS, SETUP
from model import HOST
from pair import Pair
from test_model_random import draw, drive

SEEDS = [int(os.environ["KVPOOL_SEED"])] if "KVPOOL_SEED" in os.environ else list(range(120))
BEFORE = (
    "serve",
    "again",
    "serve",
    "again",
    "create",
    "resume",
    "suspend",
    "suspend",
    "evict",
    "evict",
    "close",
    "close",
)
BETWEEN = ("resume", "suspend", "resize", "evict", "evict", "close", "create", "commit", "wait", "probe")


class Claims(Pair):
    """Batches whose claims are provided in any order, while the others do what they like."""

    def step(self, rng: random.Random, names: tuple[str, ...]) -> None:
        names = tuple(name for name in names if self.ready(name))
        if not names:
            return
        name = rng.choice(names)
        values = draw(rng, OPERATIONS[name][1])
        if "at" in values and self.open and self.open[values["at"] % len(self.open)][1].in_work and name != "suspend":
            return  # a claim in work is provided below, or freed
        self.do(name, **values)

    def batch(self, rng: random.Random) -> None:
        before = len(self.open)
        entries = tuple(
            (rng.randrange(24), rng.randrange(3, 9), (rng.randrange(3),) * rng.randrange(1, 4), 0)
            for _ in range(rng.randrange(1, 4))
        )
        self.do("claim", **draw(rng, OPERATIONS["claim"][1]) | {"batch": entries, "least": None})
        claims = self.open[before:]
        rng.shuffle(claims)
        for real, model in claims:
            for _ in range(rng.randrange(4)):
                self.step(rng, BETWEEN)
            if rng.random() < 0.2:
                self.do("close", at=self.open.index((real, model)))
                continue
            far = sum(page is not None and page.tier == HOST for row in model.table for page in row)
            tokens = len(model.prompt) - model.history
            self.do("provide", ats=(self.open.index((real, model)),), grow=tokens)
            assert model.state == "ACTIVE", "promised and not delivered"
            assert model.capacity == len(model.prompt)
            self.count("delivered")
            self.count("delivered from the host", far > 0)
            self.count("delivered under pressure", 0 in [self.model.free("device", pool) for pool in self.model.pools])


def test_what_phase_1_counted_phase_2_delivers_in_any_order_under_pressure_and_with_onboarding() -> None:
    did: Counter[str] = Counter()
    for seed in backend.few(SEEDS, 30):
        rng = random.Random(seed)
        slots = {name: rng.randint(3, 8) for name in ("slots", "second", "third")}
        host = (rng.randint(1, 8), rng.randint(1, 8), rng.randint(1, 8))
        pair = Claims(**draw(rng, SETUP) | slots | {"host": host, "least": rng.choice((0, 30))})
        try:
            for _ in range(8):
                for _ in range(rng.randrange(12)):
                    pair.step(rng, BEFORE)
                if pair.ready("claim"):
                    pair.batch(rng)
            pair.finish()
        except BaseException:
            print(f"seed {seed}: KVPOOL_SEED={seed} runs it again")
            raise
        did += pair.did
    print({name: did[name] for name in did if "deliver" in name or "claim" in name})
    if len(SEEDS) > 1:
        least, on_host = (100, 20) if backend.device() == "cpu" else (20, 2)
        assert min(did["delivered"], did["delivered under pressure"], did["claim refused"]) > least
        assert did["delivered from the host"] > on_host


class Silent(Pair):
    """Reads no event before the end."""

    def compare_events(self) -> None:
        pass

    def finish(self) -> None:
        if self.sound:
            super().compare_events()
        super().finish()


def test_events_of_a_whole_run_give_the_tree_of_each_tier() -> None:
    did: Counter[str] = Counter()
    for seed in backend.few(SEEDS[:40], 10):
        host = random.Random(seed)
        pair = drive(seed, Silent, 150, host=(host.randint(1, 8), host.randint(1, 8), host.randint(1, 8)))
        did += pair.did
    assert min(did["offloaded"], did["onboarded"]) > (20 if backend.device() == "cpu" else 5)
