"""runtime.compiled: byte code that was made elsewhere is that of the source, or is not used."""

from __future__ import annotations

import importlib.util
import marshal
from pathlib import Path

import pytest

from runtime import compiled, install
from runtime.thinned import compile_thin

SOURCE = b"def f(x: int) -> int:\n    return x + 1\n\n\ndef g() -> int:\n    return f(1)\n"


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    file = tmp_path / "one.py"
    file.write_bytes(SOURCE)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "sources", lambda: {"runtime.one": file})
    monkeypatch.setattr(install, "groups", dict)
    return compiled.made("/ocid")


def test_what_is_known_is_not_compiled_again_and_lies_where_it_is_to_be(
    saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    wanted = compile_thin(SOURCE, "/ocid/one.py", None)
    monkeypatch.setattr(compiled, "compile_thin", refuse)
    found = compiled.compiler(saved)(SOURCE, "/ocid/one.py", None)
    assert marshal.dumps(found) == marshal.dumps(wanted) and found.co_filename == "/ocid/one.py"


@pytest.mark.parametrize(
    ("source", "path", "usual"),
    [(SOURCE + b"x = 1\n", "/ocid/one.py", None), (SOURCE, "/ocid/two.py", None), (SOURCE, "/ocid/one.py", {"f"})],
)
def test_what_is_not_known_is_compiled(saved: bytes, source: bytes, path: str, usual: set[str] | None) -> None:
    found = compiled.compiler(saved)(source, path, usual)
    wanted = compile_thin(source, path, usual)  # held, as the other is: marshal tells what is held from what is not
    assert marshal.dumps(found) == marshal.dumps(wanted)


def test_code_of_another_python_is_not_loaded(saved: bytes) -> None:
    _, known = marshal.loads(saved)
    other = marshal.dumps((b"\0" + importlib.util.MAGIC_NUMBER[1:], dict.fromkeys(known, b"garbage")))
    assert compiled.compiler(other)(SOURCE, "/ocid/one.py", None).co_filename == "/ocid/one.py"
