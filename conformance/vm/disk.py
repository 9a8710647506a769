"""The clone as a read-only disk: what git knows of and what is new in the work tree, with byte code.

Refuses to share a directory: the cloud kernel may lack 9p and virtiofs, and a disk works under every kernel. Invariant:
the clone is only read; modification times stay, since byte code is checked against them.
"""

from __future__ import annotations

import compileall
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType

from conformance.vm.image import ROOT, write_ext4

_THERE = "/ocid"  # where the machine has it
_TREES = ("runtime", "cri", "imagestore", "snapshotter", "conformance", "tests")


def write_disk(
    target: Path,
    sessions: Sequence[Sequence[str]],
    built: Sequence[Path],
    *,
    shell: bool,
    runtime: str,
    require_all: bool,
) -> None:
    """Makes `target`: the clone with what was built in it, and below .vm/ what the machine is to run: the arguments of
    each of the `sessions`."""
    staging = target.with_name("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in sorted(os.fsdecode(path) for path in listed.split(b"\0") if path):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, staging / name)
    for path in built:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        (staging / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        copy(path, staging / path.relative_to(ROOT))
    for tree in _TREES:
        # The machine has this Python's minor version: image.key() says so.
        compileall.compile_dir(staging / tree, quiet=2, stripdir=str(staging), prependdir=_THERE)
    _rewrite(staging, sessions)
    (staging / ".venv").symlink_to("/opt/venv")
    own = staging / ".vm"
    own.mkdir()
    for number, arguments in enumerate(sessions, 1):
        (own / f"session{number}").write_text("".join(f"{word}\n" for word in arguments))
    if shell:
        (own / "shell").touch()
    (own / "runtime").write_text(runtime)
    # As hack/setup and guest/tests have it: without the columns of each instruction.
    command = [sys.executable, "-X", "no_debug_ranges", "-m", "runtime.compiled", "save", str(own / "compiled"), _THERE]
    subprocess.run(command, cwd=ROOT, check=True)
    if require_all:
        (own / "require-all").touch()
    size = sum(path.stat().st_size + 4096 for path in staging.rglob("*") if path.is_file()) >> 20
    write_ext4(target, staging, size * 2 + 16)
    shutil.rmtree(staging)


def _rewrite(staging: Path, sessions: Sequence[Sequence[str]]) -> None:
    """The tests' byte code as pytest wants it, with its assertions: it makes that itself where there is none."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    for arguments in sessions:
        # What cannot be collected says so in the machine.
        subprocess.run(
            [*words, *arguments],
            cwd=staging,
            env=environment | {"OCID_VM": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    for path in staging.rglob("*-pytest-*.pyc"):
        content = path.read_bytes()
        # PEP 552: a header of 16 bytes, which tells of the source's time and size.
        path.write_bytes(content[:16] + marshal.dumps(_moved(marshal.loads(content[16:]), str(staging))))


def _moved(code: CodeType, staging: str) -> CodeType:
    """The same of a file that is where the machine has it: a traceback shows its lines."""
    inner = tuple(_moved(one, staging) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.replace(co_filename=code.co_filename.replace(staging, _THERE, 1), co_consts=inner)
