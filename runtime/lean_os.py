"""A module `os` that is made in a tenth of the time: that of the standard library defines thirty abstract classes.

For ocirun only, which runtime/boot.py starts in an interpreter with -X utf8 and without site. Has what posix has, the
path functions and what else ocirun usually needs; whatever else is asked for brings in the real module, and from then
on this one has all of its names. Refuses writes to `environ`, which would not reach the process. Invariant: what is
here does what the real one does.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import MappingProxyType, ModuleType
else:
    ModuleType, MappingProxyType = type(sys), type(type.__dict__)


def install() -> None:
    """Makes it the module that `import os` finds, unless another one is there."""
    if "os" not in sys.modules:
        sys.modules["os"] = module = _Lean("os")
        import posixpath

        module.__dict__["path"] = sys.modules["os.path"] = posixpath


class _Lean(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        names = self.__dict__
        names.update((key, value) for key, value in vars(posix).items() if key[:2] != "__")
        names.update(
            SEEK_SET=0,
            SEEK_CUR=1,
            SEEK_END=2,
            name="posix",
            sep="/",
            fsencode=fsencode,
            fsdecode=fsdecode,
            makedirs=makedirs,
            environ=MappingProxyType({fsdecode(key): fsdecode(value) for key, value in posix.environ.items()}),
            environb=MappingProxyType(posix.environ),
        )

    def __getattr__(self, name: str) -> object:
        if name[:2] == "__":  # what the import system asks of every module
            raise AttributeError(f"module 'os' has no attribute {name!r}")
        del sys.modules["os"]
        try:
            real = __import__("os")
        finally:
            sys.modules["os"] = self
        _Lean.__getattr__ = _missing  # type: ignore[method-assign]
        self.__dict__.update((key, value) for key, value in vars(real).items() if key != "__name__")
        return getattr(real, name)


def _missing(_self: object, name: str) -> object:
    raise AttributeError(f"module 'os' has no attribute {name!r}")


def fsencode(filename: str | bytes) -> bytes:
    """As os.fsencode, in UTF-8 mode."""
    path = posix.fspath(filename)
    return path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path


def fsdecode(filename: str | bytes) -> str:
    """As os.fsdecode, in UTF-8 mode."""
    path = posix.fspath(filename)
    return path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path


def makedirs(name: str, mode: int = 0o777, exist_ok: bool = False) -> None:
    """As os.makedirs: parents get the default mode."""
    parent = name.rstrip("/").rpartition("/")[0]
    if parent and not _exists(parent):
        makedirs(parent, exist_ok=True)
    try:
        posix.mkdir(name, mode)
    except OSError:
        if not exist_ok or not _is_directory(name):
            raise


def _exists(path: str) -> bool:
    try:
        posix.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _is_directory(path: str) -> bool:
    try:
        return posix.stat(path).st_mode & 0o170000 == 0o040000
    except (OSError, ValueError):
        return False
