"""The one exception of the runtime: which step failed, on what, with which errno, and what to do about it.

Refuses to log: raise or log, never both. Invariant: a failure in the container's init crosses the pipe to the caller
of create, start or exec as JSON and reads there exactly as it read where it happened.
"""

from __future__ import annotations

import errno as _errno
import os

CODES = frozenset(
    {"not_found", "already_exists", "failed_precondition", "invalid_argument", "unavailable", "deadline", "internal"}
)


class RuntimeFailure(Exception):
    """`str()` is one sentence: what, on which object, errno. `step` names the step of a start, `hint` what to do
    (both may be ""), `errno` is 0 where no system call failed, `code` is one of CODES."""

    def __init__(self, message: str, *, step: str = "", errno: int = 0, hint: str = "", code: str = "internal") -> None:
        super().__init__(message)
        self.message = message
        self.step = step
        self.errno = errno
        self.hint = hint
        self.code = code if code in CODES else "internal"

    def __str__(self) -> str:
        return self.message

    def in_step(self, step: str) -> RuntimeFailure:
        """The same failure with `step` filled in, unless an inner one named its own."""
        if not self.step:
            self.step = step
        return self

    def to_json(self) -> dict[str, object]:
        """What `from_json` takes at the other end of a pipe."""
        return {
            "message": self.message,
            "step": self.step,
            "errno": self.errno,
            "hint": self.hint,
            "code": self.code,
        }

    @classmethod
    def from_json(cls, value: object) -> RuntimeFailure:
        """The failure that `to_json` described; anything else is one about that."""
        if not isinstance(value, dict):
            return cls(f"the other process reported no readable failure: {value!r:.200}")
        number = value.get("errno", 0)
        return cls(
            str(value.get("message", "")),
            step=str(value.get("step", "")),
            errno=number if isinstance(number, int) else 0,
            hint=str(value.get("hint", "")),
            code=str(value.get("code", "internal")),
        )

    @classmethod
    def of(cls, error: BaseException, *, step: str = "", what: str = "", code: str = "internal") -> RuntimeFailure:
        """Any exception as a failure; `what` is put before the sentence ("mount proc on /proc")."""
        if isinstance(error, cls):
            if what:
                error.message = f"{what}: {error.message}"
            return error.in_step(step)
        number = error.errno or 0 if isinstance(error, OSError) else 0
        notes = "; ".join(getattr(error, "__notes__", ()))
        text = (_os_error(error) if isinstance(error, OSError) else str(error)) or type(error).__name__
        sentence = f"{what}: {text}" if what else text
        return cls(f"{sentence} ({notes})" if notes else sentence, step=step, errno=number, code=code)


def _os_error(error: OSError) -> str:
    """An OSError as KernelError words it: call or file, errno's name, its words in lower case."""
    if hasattr(error, "call") or error.errno is None:
        return str(error)
    on = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return f"{on}{_errno.errorcode.get(error.errno, error.errno)} {os.strerror(error.errno).lower()}"
