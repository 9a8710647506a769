"""python -m runtime.install [--if-stale] PREFIX: writes the command PREFIX/bin/ocirun and what makes its start quick.

    PREFIX/bin/ocirun             a launcher of a dump (runtime/dump.py), or the same as the next
    PREFIX/lib/ocirun/ocirun      a line of shell: this interpreter through its dynamic loader (see runtime/sealed.py)
    PREFIX/lib/ocirun/boot.pyc    runtime/boot.py, compiled
    PREFIX/lib/ocirun/modules     the byte code of runtime/ and of what it imports of the standard library, in one file
    PREFIX/lib/ocirun/compiled    what that file was made of: it is kept while all of it is as it was
    PREFIX/lib/ocirun/dump-HASH   the memory of an interpreter that has imported all of that
    PREFIX/lib/ocirun/made-of     the files that it was made of (runtime/made_of.py)

With --if-stale nothing is written unless the dump has become stale. Refuses to guess: where the interpreter names no
loader, the command starts it directly, which is slower and as safe. Invariant: each file is whole or the old one, and
one process writes at a time; the command works, at a slower pace, without the last five.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import marshal
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType

from runtime import boot, dump, made_of, sealed
from runtime.cli import COMMANDS
from runtime.thinned import compile_thin

Compiler = Callable[[bytes, str, set[str] | None], CodeType]
ROOT = Path(__file__).resolve().parent.parent
# {command: {module: functions that it calls in a usual container}}, written by hack/usual.py
USUAL = ROOT / "runtime/usual.json"
# What ocirun never imports: the shim's side, which is in the dump alone, and this.
_NOT_OCIRUN = (
    "runtime.shim",
    "runtime.install",
    "runtime.boot",
    "runtime.compiled",
    "runtime.dump",
    "runtime.made_of",
    "runtime.linux.processor",
    "runtime.resumable",
    "runtime.thinned",
)
# What is imported on demand, and nearly every container demands, by the command's module.
_USUAL = {
    "make": ("runtime.rootfs_cgroup", "runtime.cgroups.limits", "runtime.cgroups.killer"),
    "enter": ("runtime.linux.cgroup",),
}
_PT_INTERP = 3
_CHUNK = 120_000  # below malloc's threshold for mapping, M_MMAP_THRESHOLD
# Prints name and source of each module as its execution ends.
_LISTING = """
import sys
from importlib.machinery import SourceFileLoader
execute = SourceFileLoader.exec_module
def executed(self, module):
    execute(self, module)
    print(module.__name__, module.__file__)
SourceFileLoader.exec_module = executed
sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    __import__(name)
"""


def main(arguments: list[str], compiled: Compiler = compile_thin) -> int:
    if_stale = arguments[:1] == ["--if-stale"]
    if len(arguments) != 1 + if_stale:
        print("usage: python -m runtime.install [--if-stale] PREFIX", file=sys.stderr)
        return 2
    prefix = Path(arguments[-1]).resolve()
    with dump.locked(prefix, "ocirun") as library:
        if not if_stale or made_of.stale(library):
            _install(prefix, library, compiled)
    return 0


def _install(prefix: Path, library: Path, compiled: Compiler) -> None:
    modules = _kept(library) or _compile(library, compiled)
    dump.write(library / "boot.pyc", _boot(library / "modules"))
    words = [*loader(sealed.interpreter()), sealed.interpreter(), "-IS", "-X", "utf8", str(library / "boot.pyc")]
    slow = library / "ocirun"
    dump.write(slow, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'.encode(), 0o755)
    dumped = [*(name for name in modules if name.startswith("runtime.")), "runtime.shim.zygote"]
    dump.put(dump.make(slow, dumped), prefix / "bin/ocirun", slow)


def _kept(library: Path) -> list[str]:
    """The modules in the file that is there, if it was made of what it would be made of now. What makes a dump stale is
    mostly a library that has changed, and to compile is two thirds of the work."""
    try:
        known = json.loads((library / "compiled").read_bytes())
        digest = hashlib.sha256((library / "modules").read_bytes()).hexdigest()
        is_same = known["digest"] == digest and known["files"] == _facts(known["files"]) and known["by"] == _compiler()
        return list(known["modules"]) if is_same else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _compile(library: Path, compiled: Compiler) -> list[str]:
    modules = sources()
    facts = _facts(map(str, modules.values()))  # before they are read: one that changes meanwhile does not match
    content = bundle(modules, groups(), compiled)
    digest = hashlib.sha256(content).hexdigest()
    known = {"modules": list(modules), "digest": digest, "files": facts, "by": _compiler()}
    (library / "compiled").unlink(missing_ok=True)
    dump.write(library / "modules", content)
    dump.write(library / "compiled", json.dumps(known).encode())
    return list(modules)


def _compiler() -> str:
    """What byte code depends on besides its source."""
    return f"{sys.version} {sys.flags.optimize} {'no_debug_ranges' in sys._xoptions}"


def _facts(paths: Iterable[str]) -> dict[str, list[int]]:
    """Modification time in ns and size of these files, and of all else that decides what is compiled, and how. Raises
    OSError."""
    ours = (str(path) for path in (ROOT / "runtime").rglob("*.py"))
    found = ((path, os.stat(path)) for path in {*paths, *ours, str(USUAL), sealed.interpreter()})
    return {path: [status.st_mtime_ns, status.st_size] for path, status in found}


def sources() -> dict[str, Path]:
    """Module names and source files of all that ocirun can import and that the interpreter does not have inside."""
    ours = {module_name(path): path for path in sorted((ROOT / "runtime").rglob("*.py"))}
    ours = {name: path for name, path in ours.items() if not name.startswith(_NOT_OCIRUN)}
    return ours | {name: path for name, path in _imported(list(ours)).items() if name not in ours}


def groups() -> dict[str, list[str]]:
    """For each command that puts a process into a container: the modules of ours that it imports, each after what it
    needs. Not the standard library's: there are cycles among those."""
    found = {}
    for command, (module, _, enters) in COMMANDS.items():
        if enters:
            names = _imported(
                ["runtime.cli", "runtime.sealed", "runtime.linux.exe", f"runtime.commands.{module}", *_USUAL[module]]
            )
            found[command] = [name for name in names if name.partition(".")[0] == "runtime"]
    return found


def _imported(names: list[str]) -> dict[str, Path]:
    """The modules with a source file that importing `names` brings into a fresh interpreter, in the order in which
    they are complete."""
    command = [sealed.interpreter(), "-IS", "-c", _LISTING, str(ROOT), *names]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return {name: Path(path) for name, _, path in (line.partition(" ") for line in listed)}


def module_name(path: Path) -> str:
    """Of a source file of ours."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def bundle(modules: dict[str, Path], preloads: dict[str, list[str]], compiled: Compiler = compile_thin) -> bytes:
    """The file that runtime/boot.py describes. `compiled` may know the code of some modules already: making all of it
    is nine tenths of the work here."""
    usual: dict[str, dict[str, list[str]]] = json.loads(USUAL.read_bytes())
    rest, index, text = bytearray(), {}, {}

    def add(thing: CodeType | tuple[CodeType, ...]) -> tuple[int, int]:
        data = marshal.dumps(thing)
        rest.extend(data)
        return len(rest) - len(data), len(data)

    for name, path in modules.items():
        status = path.stat()  # before the source is read: one that changes meanwhile does not match
        text[name] = path.read_bytes(), str(path)
        code = compiled(*text[name], None)
        index[name] = (*add(code), path.name == "__init__.py", str(path), status.st_mtime_ns, status.st_size)
    groups = {}
    for command, names in preloads.items():
        functions = usual.get(command, {})
        thin = {name: compiled(*text[name], set(functions[name]) if name in functions else None) for name in names}
        chunks = _chunks({name: len(marshal.dumps(code)) for name, code in thin.items()})
        groups[command] = [(chunk, *add(tuple(thin[name] for name in chunk))) for chunk in chunks]
    header = marshal.dumps((index, groups))
    return f"{len(header):0{boot.HEADER}}".encode() + header + bytes(rest)


def _chunks(sizes: dict[str, int]) -> list[list[str]]:
    """In order, each of at most _CHUNK bytes: code objects of one chunk share their strings, and the memory that one
    chunk is read into serves the next (malloc maps anew what is larger, and each page of that costs a fault)."""
    chunks: list[list[str]] = []
    size = _CHUNK
    for name, length in sizes.items():
        size += length
        if size > _CHUNK:
            chunks.append([])
            size = length
        chunks[-1].append(name)
    return chunks


def _boot(modules: Path) -> bytes:
    """A .pyc (PEP 552, one that is not checked against a source) of runtime/boot.py that ends in a call of its main."""
    code = compile(boot_source(modules), ROOT / "runtime/boot.py", "exec", dont_inherit=True, optimize=2)
    return importlib.util.MAGIC_NUMBER + struct.pack("<IQ", 1, 0) + marshal.dumps(code)


def boot_source(modules: Path) -> str:
    """runtime/boot.py, and a call of its main."""
    return f"{(ROOT / 'runtime/boot.py').read_text()}\n\nmain({str(ROOT)!r}, {str(modules)!r})\n"


def loader(program: str) -> list[str]:
    """The dynamic loader that an ELF file names (elf(5), PT_INTERP), as the start of a command line; empty if none."""
    with open(program, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":
            return []
        offset, size, count = (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))
        file.seek(offset)
        table = file.read(size * count)
        for number in range(count):
            kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", table, number * size)
            if kind == _PT_INTERP:
                file.seek(start)
                return [os.fsdecode(file.read(length).rstrip(b"\0"))]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
