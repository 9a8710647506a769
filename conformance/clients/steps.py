"""Steps: what they compare, how they are played, what is counted.

A step is a function over a client; it raises Surprise at the first thing that is not as expected, and may return a
remark on what this machine let it show. Steps stand alone, so one that fails hides nothing of the others. Refuses to
skip: a step that a runtime cannot pass is declared so with its reason (`unless`), must then really fail, and is an
error once it passes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from conformance.crictl.tool import CheckFailed

WAIT_S = 20.0
FAILURES = (OSError, LookupError, ValueError, subprocess.SubprocessError, CheckFailed)


class Surprise(Exception):
    """Something is not as it should be: one sentence with what was expected and what came."""


class Client(Protocol):
    """What steps are played on."""

    runtime: str

    def tidy(self) -> None:
        """Takes away what a step has made, however far it came."""


C = TypeVar("C", bound=Client)
# (step, runtime) -> why that runtime cannot pass it.
_UNABLE: dict[tuple[str, str], str] = {}


def unless(runtime: str, reason: str) -> Callable[[Callable[[C], str | None]], Callable[[C], str | None]]:
    """Declares that `runtime` fails this step."""

    def note(step: Callable[[C], str | None]) -> Callable[[C], str | None]:
        _UNABLE[_key(step), runtime] = reason
        return step

    return note


def _key(step: Callable[[C], str | None]) -> str:
    return f"{step.__module__}.{step.__name__}"


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Surprise(what)


def same(what: str, seen: object, wanted: object) -> None:
    if seen != wanted:
        raise Surprise(f"{what}: expected {wanted!r}, got {seen!r}")


def holds(what: str, text: str, *parts: str) -> None:
    """Every one of `parts` is in `text`."""
    for part in parts:
        if part not in text:
            raise Surprise(f"{what}: expected {part!r} in it, got {text!r}")


def eventually(probe: Callable[[], object], what: str, wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while not probe():
        if time.monotonic() > deadline:
            raise Surprise(f"not within {wait_s:.0f} s: {what}")
        time.sleep(0.02)


@dataclass(slots=True)
class Score:
    passed: int = 0
    failed: int = 0

    def add(self, other: Score) -> None:
        self.passed += other.passed
        self.failed += other.failed


def play(client: C, steps: Sequence[Callable[[C], str | None]], only: str = "") -> Score:
    """Plays the steps in order (those whose name holds `only`) and prints each with its time."""
    score = Score()
    for step in steps:
        if only not in step.__name__:
            continue
        began = time.perf_counter()
        surprise, remark = _played(client, step)
        reason = _UNABLE.get((_key(step), client.runtime))
        if reason is None:
            good, outcome = not surprise, surprise or remark
        else:
            good = bool(surprise)
            outcome = f"cannot: {reason}" if good else f"it passes, and is declared not to ({reason})"
        score.add(Score(passed=int(good), failed=int(not good)))
        mark = "" if good else "FAILED: "
        print(f"  {step.__name__:24} {(time.perf_counter() - began) * 1000:6.0f} ms  {mark}{outcome}", flush=True)
    return score


def _played(client: C, step: Callable[[C], str | None]) -> tuple[str, str]:
    """What was surprising ("": nothing), and what to say when nothing was."""
    surprise, remark = "", "ok"
    try:
        said = step(client)
        remark = f"ok: {said}" if said else remark
    except (Surprise, *FAILURES) as error:
        surprise = str(error) if isinstance(error, (Surprise, CheckFailed)) else f"{type(error).__name__}: {error}"
    try:
        client.tidy()
    except (Surprise, *FAILURES) as error:
        # podman 4.3 loses a race over a pod's /dev/shm now and then, with runc as well: once more, and said. What
        # cannot be tidied up then either has failed.
        remark = f"{remark} (tidied up twice: {str(error)[:200]})"
        try:
            client.tidy()
        except (Surprise, *FAILURES) as again:
            surprise = surprise or f"to tidy up: {again}"
    return surprise, remark


def criu_fails() -> str:
    """What criu finds missing in this kernel; "" where it works."""
    result = subprocess.run(["criu", "check"], capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    errors = [line.partition("): ")[2] for line in result.stderr.splitlines() if line.startswith("Error")]
    return errors[0] if errors else f"criu check ends with {result.returncode}"
