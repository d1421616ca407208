"""The manager against the reference model under hypothesis: a failure shrinks to a few operations.

The same examples in each run; `KVPOOL_EXAMPLES=n` tries n new ones instead.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import backend
from domains import EVENTS, OPERATIONS, SETUP, Domain
from pair import Pair

EXAMPLES = int(os.environ.get("KVPOOL_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 800,
    stateful_step_count=50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def strategies(domains: dict[str, Domain]) -> dict[str, st.SearchStrategy[Any]]:
    """How hypothesis draws the values of an operation."""
    return {name: st.sampled_from(domain) for name, domain in domains.items()}


class Machine(RuleBasedStateMachine):
    """One example: a manager of any shape and some operations on it. The rules are `OPERATIONS`, added below."""

    total: ClassVar[Counter[str]] = Counter()
    operations = 0
    pair: Pair | None = None

    @initialize(**strategies(SETUP))
    def start(self, **values: Any) -> None:
        self.pair = Pair(**values, tell=note)

    def teardown(self) -> None:
        if self.pair is not None:
            self.pair.finish()
            Machine.total += self.pair.did
            Machine.operations += self.pair.operations


def operation(name: str) -> Callable[[Machine], None]:
    """The rule of one operation. No precondition: steps drawn around those could not be dropped one by one."""

    def run(machine: Machine, **values: Any) -> None:
        if machine.pair is not None and machine.pair.ready(name):
            machine.pair.do(name, **values)

    run.__name__ = name
    return rule(**strategies(OPERATIONS[name][1]))(run)


for each, (weight, _) in OPERATIONS.items():
    for copy in range(max(1, weight // 6)):
        setattr(Machine, f"{each}_{copy}", operation(each))


@pytest.mark.timeout(600)  # to shrink takes up to five minutes
def test_manager_equals_model_in_every_state() -> None:
    examples = SETTINGS.max_examples if backend.device() == "cpu" else 40
    Machine.total, Machine.operations = Counter(), 0
    run_state_machine_as_test(Machine, settings=settings(SETTINGS, max_examples=examples))
    print(f"{Machine.operations} operations: {dict(Machine.total)}")
    if not EXAMPLES and backend.device() == "cpu":
        # Hypothesis takes constants from the source, so its examples change with every edit; what is rare among them is
        # demanded of the seeded runs in test_model_random.py only.
        assert not EVENTS - {"expired"} - Machine.total.keys()
