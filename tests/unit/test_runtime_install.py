"""The command `ocirun` as runtime/install.py writes it, and the file of modules that it starts from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest

from runtime import boot, dump, install, sealed

BUNDLED = "bundled"


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, Path]:
    """(tree, bundle) of a package with two modules, one of which imports the other."""
    tree = tmp_path / "tree"
    (tree / "things").mkdir(parents=True)
    (tree / "things/__init__.py").write_text("")
    (tree / "things/low.py").write_text(f"VALUE = '{BUNDLED}'\n")
    (tree / "things/high.py").write_text("from things.low import VALUE\nfrom things import low\nLOW = low\n")
    names = {"things": "things/__init__.py", "things.low": "things/low.py", "things.high": "things/high.py"}
    bundle = tmp_path / "modules"
    modules = {name: tree / path for name, path in names.items()}
    bundle.write_bytes(install.bundle(modules, {"run": list(names)}))
    return tree, bundle


def asked(bundle: Path, tree: Path, *words: str) -> str:
    """VALUE as an interpreter of its own sees it, and where the module came from."""
    code = (
        "import sys; from runtime.boot import Bundle; tree, bundle, *words = sys.argv[1:]; sys.path.append(tree)\n"
        "found = Bundle(bundle); sys.meta_path.insert(0, found); found.preload(words)\n"
        "ready = 'things.high' in sys.modules\n"
        "import things.high as high, things.low as low\n"
        "assert high.LOW is low and low.__file__.endswith('low.py') and things_is(high)\n"
        "print(high.VALUE, ready, low.__spec__ is None or type(low.__spec__.loader).__name__)"
    ).replace("things_is(high)", "sys.modules['things'].high is high")
    environment = {**os.environ, "PYTHONPATH": str(install.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, str(tree), str(bundle), *words]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def test_modules_come_from_the_bundle(package: tuple[Path, Path]) -> None:
    tree, bundle = package
    assert asked(bundle, tree) == f"{BUNDLED} False Bundle"
    assert asked(bundle, tree, "--root", "x", "run", "exec") == f"{BUNDLED} True True"
    assert asked(bundle, tree, "state") == f"{BUNDLED} False Bundle"


def test_a_source_that_changed_counts(package: tuple[Path, Path]) -> None:
    tree, bundle = package
    (tree / "things/low.py").write_text("VALUE = 'of the source'\n")
    assert asked(bundle, tree) == "of the source False SourceFileLoader"
    assert asked(bundle, tree, "run") == "of the source True SourceFileLoader"


def test_a_touched_source_is_read_again(package: tuple[Path, Path]) -> None:
    tree, bundle = package
    os.utime(tree / "things/low.py", ns=(1, 1))
    assert asked(bundle, tree, "run") == f"{BUNDLED} True SourceFileLoader"


def test_what_is_in_a_package_that_changed_waits_for_it(package: tuple[Path, Path]) -> None:
    tree, bundle = package
    (tree / "things/__init__.py").write_text("MORE = 1\n")
    assert asked(bundle, tree, "run") == f"{BUNDLED} False Bundle"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A prefix, and what its file of modules holds."""
    prefix = tmp_path_factory.mktemp("prefix")
    assert install.main([str(prefix)]) == 0
    return prefix, (prefix / "lib/ocirun/modules").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_the_command_works_without_its_file_of_modules(installed: tuple[Path, bytes], damage: str) -> None:
    prefix, whole = installed
    modules = prefix / "lib/ocirun/modules"
    modules.unlink(missing_ok=True)
    if damage != "missing":
        modules.write_bytes({"empty": b"", "cut": whole[:100], "garbage": b"0" * boot.HEADER + whole}[damage])
    said = subprocess.run([prefix / "bin/ocirun", "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.startswith("ocirun version ")


def test_modules_are_compiled_again_when_something_has_changed_or_is_damaged(
    installed: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = installed[0] / "lib/ocirun"
    (library / "modules").write_bytes(installed[1])
    names = install._kept(library)
    assert {"runtime.cli", "runtime.init", "struct"} <= set(names)
    known = json.loads((library / "compiled").read_bytes())
    for change in (
        {"files": {**known["files"], str(install.USUAL): [1, 1]}},
        {"files": {path: facts for path, facts in known["files"].items() if not path.endswith("/options.py")}},
        {"files": {**known["files"], str(tmp_path / "gone.py"): [1, 1]}},
        {"digest": "another"},
        {"by": "another"},
        {"files": None},
    ):
        (library / "compiled").write_text(json.dumps(known | change))
        assert install._kept(library) == []
    for damage in ("", "[]", "{}", "\0"):
        (library / "compiled").write_text(damage)
        assert install._kept(library) == []
    (library / "compiled").write_text(json.dumps(known))
    assert install._kept(library) == names
    (library / "modules").write_bytes(installed[1][:-1])
    assert install._kept(library) == []
    # Made anew, and kept from then on: what is compiled is told by who compiles.
    asked: list[str] = []

    def compiled(source: bytes, name: str, functions: set[str] | None) -> CodeType:
        asked.append(name)
        return compile("", name, "exec")

    monkeypatch.setattr(dump, "make", lambda *_: None)
    assert install.main([str(installed[0])], compiled) == 0 and asked
    asked.clear()
    assert install.main([str(installed[0])], compiled) == 0 and not asked
    (library / "compiled").unlink()


def test_groups_hold_what_the_commands_import(tmp_path: Path) -> None:
    found = install.groups()
    assert {"run", "create", "exec"} <= set(found)
    assert "runtime.init" in found["run"] and "runtime.exec" in found["exec"]
    for names in found.values():
        assert all(name.partition(".")[0] == "runtime" for name in names)
        assert not any(name.startswith("runtime.shim") for name in names)
        # A package comes before what is in it.
        for name in names:
            parent = name.rpartition(".")[0]
            assert not parent or names.index(parent) < names.index(name)


def test_the_loader_is_the_one_that_the_program_names(tmp_path: Path) -> None:
    (found,) = install.loader(sealed.interpreter())
    assert os.access(found, os.X_OK) and Path(found).name.startswith("ld")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    assert install.loader(str(script)) == []


def test_one_prefix_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([]) == 2
    assert "usage" in capsys.readouterr().err
