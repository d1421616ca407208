"""The happens-before checker: every planted ordering bug is named, however the work is timed; clean runs are silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from kvpool import AddRequest, CacheConfig, InvariantError, KVCacheManager, PoolConfig
from kvpool.mover import AtOnceMover, CpuMover, MoveBatch, SlotUse
from movers import ORDERS, World

MODES: dict[str, dict[str, Any]] = {"threads": {}, **{order: {"simulate": (order, 1)} for order in ORDERS}}


def move(world: World, direction: str, src: list[int], dst: list[int]) -> None:
    assert world.mover.submit(MoveBatch("full", direction, src, dst)) is not None


def kernel(world: World, slot: int, writes: bool) -> None:
    """A kernel in its own thread uses a device slot."""
    stream = world.engine[1]
    assert stream is not None
    world.mover.step_begin([SlotUse("full", "device", [slot], writes)], stream)
    stream.launch(lambda: None)
    world.mover.step_end([SlotUse("full", "device", [slot], writes)], stream)


def offload_before_compute(world: World) -> None:
    kernel(world, 1, writes=True)
    move(world, "offload", [1], [0])


def reuse_before_copy(world: World) -> None:
    move(world, "offload", [1], [0])
    kernel(world, 1, writes=True)


def reuse_by_onboard_before_copy(world: World) -> None:
    move(world, "offload", [1], [0])
    move(world, "onboard", [3], [1])


def compute_before_onboard(world: World) -> None:
    move(world, "onboard", [0], [1])
    kernel(world, 1, writes=False)


def onboard_over_use(world: World) -> None:
    kernel(world, 1, writes=False)
    move(world, "onboard", [0], [1])


def staging_reuse(world: World) -> None:
    move(world, "offload", [1, 3, 5], [0, 1, 2])


def descriptor_rewrite(world: World) -> None:
    move(world, "offload", [1], [0])
    move(world, "onboard", [5], [2])


def host_read_early(world: World) -> None:
    move(world, "offload", [1], [0])
    world.mover.wait_on(None, "full", "host", [0])
    world.mover.step_end([SlotUse("full", "host", [0])])


def host_overwrite(world: World) -> None:
    move(world, "onboard", [0], [1])
    move(world, "offload", [2], [0])


def onboard_before_offload(world: World) -> None:
    move(world, "offload", [1], [0])
    move(world, "onboard", [0], [2])


# name of the plant and of the finding, what shows it, and what the message must say of it
PLANTS: list[tuple[str, Callable[[World], None], str]] = [
    ("offload-before-compute", offload_before_compute, "offload 1 reads device slot 1 .* compute stream"),
    ("reuse-before-copy", reuse_before_copy, "compute stream 2 writes device slot 1 .* offload 1"),
    ("reuse-before-copy", reuse_by_onboard_before_copy, "onboard 1 writes device slot 1 .* offload 1"),
    ("compute-before-onboard", compute_before_onboard, "compute stream 2 reads device slot 1 .* onboard 1"),
    ("onboard-over-use", onboard_over_use, "onboard 1 writes device slot 1 .* compute stream 2"),
    ("staging-reuse", staging_reuse, "copy 2 writes staging slot 0 .* offload 1"),
    ("descriptor-rewrite", descriptor_rewrite, "onboard 1 writes descriptor buffer 0 .* offload 1"),
    ("host-read-early", host_read_early, "compute 1 reads host slot 0 .* offload 1"),
    ("host-overwrite", host_overwrite, "offload 1 writes host slot 0 .* onboard 1"),
    ("onboard-before-offload", onboard_before_offload, "onboard 1 reads host slot 0 .* offload 1"),
]
IDS = [scenario.__name__ for _, scenario, _ in PLANTS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("plant", "scenario", "text"), PLANTS, ids=IDS)
def test_a_planted_bug_is_named_by_the_checker(
    plant: str, scenario: Callable[[World], None], text: str, mode: str
) -> None:
    world = World(1, options={"staging": 2 * (plant == "staging-reuse"), "plant": plant, **MODES[mode]})
    with pytest.raises(InvariantError, match=f"{plant}: {text}"):
        scenario(world)
    world.mover.close()
    clean = World(1, options={"staging": 2 * (plant == "staging-reuse"), **MODES[mode]})
    scenario(clean)
    clean.settle()
    clean.mover.close()


@pytest.mark.parametrize("plant", sorted({name for name, _, _ in PLANTS}))
def test_a_planted_bug_is_found_in_random_steps(plant: str) -> None:
    """Whatever the timing: half of the runs are threads, half are simulations in an order that hides the bug."""
    staging = 2 * (plant == "staging-reuse")
    found = 0
    for seed in range(10):
        mode = {} if seed % 2 else {"simulate": ("copies-eager", seed)}
        world = World(seed, options={"staging": staging, "plant": plant, **mode})
        try:
            for _ in range(300):
                world.step()
        except InvariantError as error:
            found += plant in str(error)
        world.mover.close()
    assert found == 10


@pytest.mark.parametrize("plant", sorted({name for name, _, _ in PLANTS}))
def test_a_simulation_shows_what_a_planted_bug_does_to_the_bytes(plant: str) -> None:
    """The simulated orders are adverse enough that a missing wait becomes a wrong byte, without the checker."""
    options: dict[str, Any] = {"staging": 2 * (plant == "staging-reuse"), "plant": plant, "check": False}
    wrong = []
    for order in ORDERS:
        for seed in range(4):
            world = World(seed, options={**options, "simulate": (order, seed)})
            try:
                world.run(300)
            except AssertionError:
                wrong.append(order)
            world.mover.close()
    assert wrong, f"{plant} went unnoticed in every order"


@pytest.mark.parametrize("mode", MODES)
def test_no_false_alarm_in_ten_thousand_clean_steps(mode: str) -> None:
    world = World(11, options=MODES[mode])
    world.run(10_000)  # a finding raises, a wrong byte fails
    assert world.checked > 5_000
    world.mover.close()


def test_the_environment_turns_the_checker_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in (("1", True), ("0", False)):
        monkeypatch.setenv("KVPOOL_CHECK", value)
        world = World(1, options={"check": None, "plant": "host-overwrite"})
        if found:
            with pytest.raises(InvariantError, match="host-overwrite"):
                host_overwrite(world)
        else:
            host_overwrite(world)
        world.mover.close()


def test_unknown_plants_and_orders_are_refused() -> None:
    for options in ({"plant": "none"}, {"simulate": ("none", 1)}):
        with pytest.raises(ValueError, match="unknown"):
            World(1, options=options)
    assert CpuMover({}).findings() == []


@pytest.mark.parametrize("checked", [True, False])
def test_a_step_that_writes_the_null_page_is_noticed_when_it_ends(
    checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPOOL_CHECK", str(int(checked)))
    with KVCacheManager(CacheConfig(4, [PoolConfig("kv", 8)], 72)) as manager:
        cache = manager.create(1, [1, 2, 3])
        assert cache.resume()
        assert cache.resize(3)
        manager.step_begin([cache])
        manager.pages("kv")[0, 5] = 1
        with pytest.raises(InvariantError, match="null page") if checked else nullcontext():
            manager.step_end([cache])
        assert cache.commit([1, 2, 3]) is False  # the step has ended all the same
        manager.pages("kv")[0] = 0
        manager.check()


def test_the_moves_of_one_call_are_offloads_then_onboards_then_copies() -> None:
    """A batch that needs room on the device, a page from the host, and a part of a block on the device."""
    log: list[str] = []

    class Noted(AtOnceMover):
        def submit(self, batch: MoveBatch, after: Any = ()) -> Any:
            log.append(batch.direction)
            return super().submit(batch, after)

    with KVCacheManager(CacheConfig(2, [PoolConfig("kv", 8)], 5 * 8, 8 * 8), mover=Noted) as manager:

        def store(*tokens: int) -> None:
            with manager.create("stored", tokens) as cache:
                assert cache.resume()
                assert cache.resize(len(tokens))
                cache.commit(tokens)

        store(10, 11)
        store(20, 21)
        assert manager.evict(1) == 1  # what was stored first is on the host
        for first in (30, 40, 50):
            store(first, first + 1)
        log.clear()
        wanted = [AddRequest("part", [40, 99]), AddRequest("up", [10, 11, 12])]
        assert [cache is not None for cache in manager.add_batch(wanted)] == [True, True]
        assert manager.stats().onboarded == 1
        order = ("offload", "onboard", "copy")
        assert set(log) == set(order)
        assert log == sorted(log, key=order.index)
