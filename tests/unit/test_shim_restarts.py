"""Which containers are started again, and when: the policy and its pauses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim.restarts import FIRST, LONGEST, STEADY, Restarts, most_restarts, policy_of


class Clock:
    """Keeps what a loop would be asked for."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.due: list[Callable[[], None] | None] = []

    def after(self, seconds: float, callback: Callable[[], None]) -> Any:
        clock, index = self, len(self.due)
        self.pauses.append(seconds)
        self.due.append(callback)

        class Timer:
            def cancel(self) -> None:
                clock.due[index] = None

        return Timer()


@pytest.mark.parametrize(
    ("policy", "runs"),
    [
        ("", [(0, False), (1, False)]),
        ("no", [(0, False), (137, False)]),
        ("always", [(0, True), (1, True), (137, True)]),
        ("on-failure", [(1, True), (0, False)]),
        ("on-failure:2", [(1, True), (255, True), (1, False)]),
    ],
)
def test_which_ends_are_followed_by_a_start(policy: str, runs: list[tuple[int, bool]]) -> None:
    restarts = Restarts(policy, {})
    for code, again in runs:
        assert restarts.wanted(code) is again
        restarts.count += again


@pytest.mark.parametrize("policy", ["sometimes", "always:1", "on-failure:", "on-failure:0", "on-failure:-1", "no:1"])
def test_other_words_are_refused(policy: str) -> None:
    with pytest.raises(RuntimeFailure, match="is not no, on-failure"):
        most_restarts(policy)


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_steady_run() -> None:
    clock, restarts = Clock(), Restarts("always", {})
    for lasted in [0.0] * 12 + [STEADY, 0.0]:
        restarts.begin(clock, lasted, lambda: None)  # type: ignore[arg-type]
    doubled = [min(FIRST * 2**n, LONGEST) for n in range(12)]
    assert clock.pauses == pytest.approx([*doubled, FIRST, 2 * FIRST])
    assert doubled[-1] == LONGEST


def test_a_retired_one_is_not_due_any_more() -> None:
    clock, restarts = Clock(), Restarts("always", {})
    restarts.begin(clock, 0.0, lambda: None)  # type: ignore[arg-type]
    restarts.retire()
    assert clock.due == [None] and not restarts.wanted(1)


@pytest.mark.parametrize("config", [None, [], {}, {"annotations": []}, {"annotations": {"ocid.restart": 1}}])
def test_a_config_that_says_nothing_has_no_policy(config: Any) -> None:
    assert policy_of(config) == ""
