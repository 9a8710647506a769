"""How failures leave the server: one table from exception class to gRPC code, the most specific class wins.

Refuses to know what went wrong: the sentence is the exception's own. Invariant: every exception has a code, and no
code is ever OK.
"""

from __future__ import annotations

import errno
import sqlite3

from grpc import StatusCode

from cri.interfaces import ContainerError, NetworkError
from cri.spec.validate import InvalidRequest
from imagestore import model as images
from snapshotter import model as snapshots


class CriError(Exception):
    """A failure that the verbs themselves find. `str()` is one sentence for the caller."""


class NotFound(CriError):
    """No such pod, container or image."""


class InvalidArgument(CriError):
    """The request can never succeed as it is."""


class AlreadyExists(CriError):
    """The name is taken."""


class FailedPrecondition(CriError):
    """The object is in a state that does not allow the call."""


class Unavailable(CriError):
    """The same call may succeed later."""


class DeadlineExceeded(CriError):
    """A time limit of the request or of the configuration has passed."""


class LimitExceeded(CriError):
    """A named limit of the configuration was reached."""


class Unimplemented(CriError):
    """A call or a field that this version does not have."""


CODES: dict[type[BaseException], StatusCode] = {
    BaseException: StatusCode.INTERNAL,
    CriError: StatusCode.INTERNAL,
    NotFound: StatusCode.NOT_FOUND,
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    InvalidRequest: StatusCode.INVALID_ARGUMENT,
    AlreadyExists: StatusCode.ALREADY_EXISTS,
    FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    Unavailable: StatusCode.UNAVAILABLE,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    LimitExceeded: StatusCode.RESOURCE_EXHAUSTED,
    Unimplemented: StatusCode.UNIMPLEMENTED,
    images.ImageError: StatusCode.INTERNAL,
    images.ReferenceInvalid: StatusCode.INVALID_ARGUMENT,
    images.ImageNotFound: StatusCode.NOT_FOUND,
    images.AccessDenied: StatusCode.PERMISSION_DENIED,
    images.RegistryUnavailable: StatusCode.UNAVAILABLE,
    images.ContentInvalid: StatusCode.DATA_LOSS,
    images.DecryptionRefused: StatusCode.PERMISSION_DENIED,
    images.PolicyInvalid: StatusCode.FAILED_PRECONDITION,
    # As CRI-O answers: a kubelet looks for the word in front of the message only where the code is UNKNOWN.
    images.SignatureRefused: StatusCode.UNKNOWN,
    snapshots.SnapshotError: StatusCode.INTERNAL,
    snapshots.NotFound: StatusCode.NOT_FOUND,
    snapshots.AlreadyExists: StatusCode.ALREADY_EXISTS,
    snapshots.UnpackError: StatusCode.DATA_LOSS,
    sqlite3.Error: StatusCode.INTERNAL,
    TimeoutError: StatusCode.DEADLINE_EXCEEDED,
    OSError: StatusCode.INTERNAL,
    MemoryError: StatusCode.RESOURCE_EXHAUSTED,
}

# What parts say of their own failures (ContainerError.code, NetworkError.code).
_WORDS = {
    "not_found": StatusCode.NOT_FOUND,
    "already_exists": StatusCode.ALREADY_EXISTS,
    "failed_precondition": StatusCode.FAILED_PRECONDITION,
    "invalid_argument": StatusCode.INVALID_ARGUMENT,
    "unavailable": StatusCode.UNAVAILABLE,
    "deadline": StatusCode.DEADLINE_EXCEEDED,
    "exhausted": StatusCode.RESOURCE_EXHAUSTED,
    "unknown": StatusCode.UNKNOWN,
    "internal": StatusCode.INTERNAL,
}

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def code_of(error: BaseException) -> StatusCode:
    """The gRPC code for `error`: of its class, or of the nearest class above it that the table names; those that
    say it themselves are believed."""
    if isinstance(error, ContainerError):
        return _WORDS.get(error.code, StatusCode.INTERNAL)
    if _is_full(error):
        return StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, NetworkError):
        return _WORDS.get(error.code, StatusCode.INTERNAL)
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def _is_full(error: BaseException) -> bool:
    """True when what `error` comes from is a disk or a table that is full, whatever a part has made of it."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
            return True
        cause = cause.__cause__
    return False


def sentence(error: BaseException) -> str:
    """What the caller reads: the error's words, a hint where there is one, and what failed while undoing."""
    words = str(error) or type(error).__name__
    hint = getattr(error, "hint", "")
    if hint and hint not in words:
        words = f"{words} (hint: {hint})"
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{words}; {notes}" if notes else words


class CallFailed(Exception):
    """A call's failure as it leaves the server, by gRPC or in this process: a code and one sentence."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> str:
        """The code's name, such as "NOT_FOUND"."""
        return str(self.code.name)
