"""python -m runtime.compiled save FILE DIRECTORY | install FILE PREFIX: ocirun's byte code, made here, installed there.

`there` is a machine on which compiling takes minutes (that of hack/vm is emulated), and DIRECTORY has the clone there.
`install` is runtime.install without that work. Code is found by source, path and what is kept of it, so nothing is
taken for another source's: what is not known, as another version of the standard library's file, is compiled.
Refuses code of another version of Python. Invariant: what is installed is what runtime.install installs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import marshal
import sys
from pathlib import Path
from types import CodeType

from runtime import install
from runtime.thinned import compile_thin


def made(there: str) -> bytes:
    """All code that `runtime.install` asks for, by `_key`, of a clone that is `there`."""
    known: dict[bytes, bytes] = {}

    def compiled(source: bytes, path: str, usual: set[str] | None) -> CodeType:
        here = str(install.ROOT)
        path = path.replace(here, there, 1) if path.startswith(f"{here}/") else path
        code = compile_thin(source, path, usual)
        known[_key(source, path, usual)] = marshal.dumps(code)
        return code

    install.bundle(install.sources(), install.groups(), compiled)
    return marshal.dumps((importlib.util.MAGIC_NUMBER, known))


def compiler(saved: bytes) -> install.Compiler:
    """compile_thin, but for what `saved` knows."""
    magic, known = marshal.loads(saved)
    if magic != importlib.util.MAGIC_NUMBER:
        known = {}

    def compiled(source: bytes, path: str, usual: set[str] | None) -> CodeType:
        code = known.get(_key(source, path, usual))
        found: CodeType = compile_thin(source, path, usual) if code is None else marshal.loads(code)
        return found

    return compiled


def _key(source: bytes, path: str, usual: set[str] | None) -> bytes:
    kept = b"*" if usual is None else "\n".join(sorted(usual)).encode()
    return hashlib.sha256(b"\0".join((path.encode(), kept, source))).digest()


def main(arguments: list[str]) -> int:
    verb, file, *rest = arguments
    if verb == "save":
        Path(file).write_bytes(made(*rest))
        return 0
    return install.main(rest, compiler(Path(file).read_bytes()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
