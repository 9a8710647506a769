"""Thinned modules behave as their sources do, and the module that stands in for `os` as the real one."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from runtime import boot, cli, install, lean_os
from runtime.thinned import THAW, compile_thin

SOURCE = b'''
from __future__ import annotations
TYPE_CHECKING = False
if TYPE_CHECKING:
    import nothing_of_that_name
else:
    OTHER = "else"
COUNT: int = 3
def plain(first: int, second: str = "two", *rest: int, word: str = "w", **more: int) -> tuple:
    """Words."""
    local: int = COUNT
    unset: int
    return first, second, rest, word, more, local
def counts(number: int):
    yield from range(number)
def outer(number: int):
    def inner() -> int:
        return number
    return inner
def kept() -> str:
    return "kept"
def fails() -> None:
    raise LookupError("of this function")
class Base:
    field: int = 1
    def method(self, add: int = 1) -> int:
        return self.field + add
    @property
    def seen(self) -> int:
        return self.method()
    @classmethod
    def made(cls) -> "Base":
        return cls()
class Derived(Base):
    def method(self, add: int = 5) -> int:
        return super().method(add) * 10
    def __len__(self) -> int:
        return 7
'''


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(builtins, THAW, boot.thaw, raising=False)
    place: dict[str, Any] = {"__name__": "thin"}
    exec(compile_thin(SOURCE, "thin.py", {"kept"}), place)  # noqa: S102
    return place


def is_stub(function: Any) -> bool:
    return THAW in function.__code__.co_names


def test_a_thawed_function_is_the_one_of_the_source(module: dict[str, Any]) -> None:
    plain = module["plain"]
    assert is_stub(plain) and plain.__qualname__ == "plain"
    assert plain(1) == (1, "two", (), "w", {}, 3)
    assert not is_stub(plain)
    assert plain(1, "2", 3, word="x", y=4) == (1, "2", (3,), "x", {"y": 4}, 3)
    with pytest.raises(TypeError, match="plain"):
        plain()


def test_methods_generators_closures_and_failures(module: dict[str, Any]) -> None:
    base, derived = module["Base"](), module["Derived"]()
    assert is_stub(module["Base"].method) and is_stub(module["Derived"].__len__)
    assert base.method() == 2 and base.seen == 2 and type(module["Derived"].made()) is module["Derived"]
    assert derived.method() == 60 and len(derived) == 7
    assert list(module["counts"](3)) == [0, 1, 2] and module["outer"](9)() == 9
    with pytest.raises(LookupError, match="of this function") as caught:
        module["fails"]()
    assert (
        caught.traceback[-1].name == "fails"
        and caught.traceback[-1].lineno + 1 == SOURCE[: SOURCE.index(b"raise")].count(b"\n") + 1
    )


def test_what_is_usual_stays_and_what_only_readers_need_goes(module: dict[str, Any]) -> None:
    assert not is_stub(module["kept"]) and not module["kept"].__annotations__
    assert module["OTHER"] == "else" and module["COUNT"] == 3 and "annotations" not in module
    # Fields of a record are read from the class.
    assert module["Base"].__annotations__ == {"field": "int"}


def test_nothing_is_read_to_thaw(module: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "open", None)
    monkeypatch.setattr("posix.open", None)
    assert module["plain"](1)[0] == 1


def test_every_usual_function_is_in_its_source() -> None:
    usual = json.loads(install.USUAL.read_bytes())
    assert set(usual) == {name for name, (_, _, enters) in cli.COMMANDS.items() if enters}
    gone = [
        f"{module}.{name}"
        for modules in usual.values()
        for module, names in modules.items()
        for name in names
        if name not in functions(module)
    ]
    assert not gone, "run python -m hack.usual"


@functools.cache
def functions(module: str) -> set[str]:
    """Qualified names of what can be called, as code objects have them."""
    path = install.ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def walk(code: CodeType) -> Iterator[str]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield constant.co_qualname
                yield from walk(constant)

    return set(walk(compile(ast.parse(path.read_bytes()), str(path), "exec")))


LEAN = """
import sys
sys.path.append(sys.argv[1])
from runtime import lean_os
lean_os.install()
"""


def lean(code: str) -> str:
    command = [sys.executable, "-IS", "-X", "utf8", "-c", LEAN + code, str(install.ROOT)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={"GIVEN": "\udcff"}
    ).stdout.strip()


def test_the_lean_os_answers_as_the_real_one() -> None:
    code = (
        "import os\n"
        "assert '_collections_abc' not in sys.modules\n"
        "own = dict(vars(os))\n"
        "assert os.path.join('a', 'b') == 'a/b' and os.environ['GIVEN'] == '\\udcff' == os.fsdecode(b'\\xff')\n"
        "assert os.fsencode('\\udcff') == b'\\xff' == os.environb[b'GIVEN']\n"
        "try: os.environ['X'] = 'y'\n"
        "except TypeError: pass\n"
        "else: raise SystemExit('environ takes a write')\n"
        "assert '_collections_abc' not in sys.modules\n"
        "os.walk\n"  # one that it does not have
        "assert '_collections_abc' in sys.modules and isinstance(os.environ, os._Environ)\n"
        "import subprocess, tempfile, os as again\n"
        "assert again is os and subprocess.run(['true']).returncode == 0\n"
        "print(sorted(name for name in own if name[:2] != '__' and not hasattr(os, name)))\n"
        "try: os.no_such_thing\n"
        "except AttributeError as error: print(error)\n"
    )
    assert lean(code).splitlines() == ["[]", "module 'os' has no attribute 'no_such_thing'"]


@pytest.mark.parametrize("name", ["a", "a/b/c", "a/b/c/", "/x"])
@pytest.mark.parametrize("exist_ok", [False, True])
def test_makedirs_as_the_real_one(tmp_path: Path, name: str, exist_ok: bool) -> None:
    outcomes = []
    for number, makedirs in enumerate((os.makedirs, lean_os.makedirs)):
        top = tmp_path / str(number)
        top.mkdir()
        outcome: list[object] = []
        for _ in range(2):
            try:
                makedirs(f"{top}/{name}", 0o711, exist_ok=exist_ok)
                outcome.append("made")
            except OSError as error:
                outcome.append(error.errno)
        tree = sorted((str(path.relative_to(top)), path.stat().st_mode) for path in top.rglob("*"))
        outcomes.append((outcome, tree))
    assert outcomes[0] == outcomes[1]
