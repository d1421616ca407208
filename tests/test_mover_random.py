"""Byte patterns over 10^5 random operations with faults: threads, and every simulated order."""

from __future__ import annotations

from typing import Any

import pytest

import backend
from movers import ORDERS, World


def faulty(seed: int, steps: int, options: dict[str, Any]) -> World:
    """Random steps; failures at random, directions that stand still for a while, full queues."""
    world = World(seed, options={"faults": True, "queue": 8, **options})
    world.mover.fail_at_random(0.02, seed)
    for number in range(1, steps + 1):
        if number % 50 == 0:
            direction = world.random.choice(["offload", "onboard", "copy"])
            if world.random.random() < 0.5:
                world.mover.fill(direction, world.random.randint(1, 4))
            else:
                # Nobody waits for the caller's own slots while a direction stands still, so it goes on at once.
                world.mover.stall(direction)
                for _ in range(5):
                    world.move()
                world.mover.stall(direction, False)
        world.step()
        if number % 200 == 0:
            world.settle()
    world.settle()
    assert world.failed > steps // 200
    assert world.full > steps // 300
    world.mover.close()
    return world


def test_every_byte_is_right_after_random_operations_with_faults_in_threads() -> None:
    if backend.device() == "cuda":
        assert sum(faulty(seed, 600, {}).checked for seed in range(4)) > 600
    else:
        assert sum(faulty(seed, 10_000, {}).checked for seed in range(5)) > 50_000


@pytest.mark.parametrize("order", ORDERS)
def test_every_byte_is_right_after_random_operations_with_faults_in_order(order: str) -> None:
    steps = 12_500 if backend.device() == "cpu" else 600
    assert faulty(21, steps, {"simulate": (order, 21)}).checked > 0.8 * steps


def test_every_byte_is_right_by_way_of_staging() -> None:
    steps = 5_000 if backend.device() == "cpu" else 600
    assert faulty(31, steps, {"staging": 3}).checked > 0.8 * steps


@pytest.mark.parametrize("direction", ["offload", "onboard", "copy"])
def test_every_page_of_a_run_may_be_the_one_that_fails(direction: str) -> None:
    for k in backend.few(range(1, 40), 6):
        world = World(5, options={"faults": True, "simulate": ("copies-last", 5)})
        world.mover.fail(k, direction)
        world.run(240)
        assert world.failed >= 1
        world.mover.close()
