"""Makes a command a program that goes on where an interpreter had stopped, with every module there.

    PREFIX/bin/NAME             the launcher: machine code, and the table of what it maps (runtime/linux/dumped.py)
    PREFIX/lib/NAME/dump-HASH   what it maps: the memory of a process that has imported all of the command, and stopped

That process is started without randomized addresses, low in the address space, where no other program's stack, heap or
libraries ever are. It goes on in a thread whose stack is a mapping, forks (of the threads only that one is left), and
stops; the functions of its C library are those that every x86-64 processor has.

Refuses to make one elsewhere than on x86-64 with glibc, or where the kernel or its policy does not let it. Invariant:
the command works without these two files, the slow way (PREFIX/lib/NAME/NAME), and so where a dump cannot be resumed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import struct
import subprocess
from pathlib import Path

from runtime import made_of, sealed
from runtime.linux import dumped, elf
from runtime.linux.memory import MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
_SETARCH = ("setarch", "--addr-no-randomize", "--addr-compat-layout")
# What functions of the C library are chosen by.
_FEATURES = (
    *("AVX", "AVX2", "AVX512F", "AVX512VL", "AVX512BW", "BMI1", "BMI2", "ERMS", "FMA", "FMA4", "FSRM", "LZCNT"),
    *("MOVBE", "RTM", "SSE4_1", "SSE4_2", "SSSE3"),
)
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LD_BIND_NOW": "1",  # what binds symbols later saves registers as this processor has them
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.pthread.rseq=0",  # the kernel would know nothing of it
            "glibc.malloc.arena_max=1",
            "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _FEATURES),
        )
    ),
}
_PROT = {"r": PROT_READ, "w": PROT_WRITE, "x": PROT_EXEC, "-": 0}
_MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 0x20, 0x100000
# What the kernel maps by itself and is needed again: the dynamic loader knows strings on the first stack, and the
# headers of the vDSO. Where another stack lies in the place of that one (as it does without randomized addresses), the
# launcher takes the slow way.
_KEPT = ("[heap]", "[stack]", "[vdso]")
_HOLE = 256 << 10  # bytes of zeros that are worth a mapping of their own
# The launcher lies below the interpreter, which is linked to 4 MiB.
_BASE = 0x200000
_SHT_DYNSYM, _STT_FUNC = 11, 2
_CHILD = "import sys; sys.path.append(sys.argv[1]); from runtime.resumable import main; main(sys.argv[2:])"


def make(slow: Path, modules: list[str], entry: str = "runtime.cli", interpreter: Sequence[str] = ()) -> Dump | None:
    """A dump of a process that has imported `modules` and, once resumed, is what `main` of the module `entry` does;
    `slow` is the command that it executes when it has become stale. `interpreter` is what it is started with, unless
    that is without site-packages. None where none can be made."""
    reader, writer = os.pipe()
    start = [*(interpreter or (sealed.interpreter(), "-IS")), "-X", "utf8", "-X", "no_debug_ranges"]
    words = [*start, "-c", _CHILD, str(ROOT), str(writer)]
    with open(reader, "rb") as told:
        try:
            process = subprocess.Popen(
                [*_SETARCH, *words, str(slow), entry, *modules],
                env=_ENVIRONMENT,
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:  # no setarch(8)
            return None
        finally:
            os.close(writer)
        with process:
            known = told.readline()
            if not told.readline():
                return None
            stopped = json.loads(known)
            pid, files = stopped["pid"], stopped.pop("files")
            try:
                return Dump(stopped, [(path, mtime, size) for path, mtime, size in files])
            except (LookupError, OSError):  # another vDSO than is known; a policy that lets nobody look into processes
                return None
            finally:
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def locked(prefix: Path, name: str) -> Iterator[Path]:
    """PREFIX/lib/NAME while nobody else writes there."""
    library = prefix / "lib" / name
    library.mkdir(parents=True, exist_ok=True)
    (prefix / "bin").mkdir(exist_ok=True)
    with (library / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield library


def put(made: Dump | None, command: Path, slow: Path, processor: str = "") -> None:
    """Writes the command: a launcher of that dump, which lies beside `slow` and is the only one there; or the same as
    `slow`. `processor` is the one that the dump is for, where it is not for all."""
    library = slow.parent
    name = f"dump-{hashlib.sha256(made.content).hexdigest()[:16]}" if made else ""
    if made:
        write(library / name, made.content)
    write(command, made.launcher(library / name, slow) if made else slow.read_bytes(), 0o755)
    # Last: after an installation that was broken off the old dump is known, and is either in use or not there.
    if made:
        write(library / made_of.FILE, made_of.told(name, made.files, processor))
    else:
        (library / made_of.FILE).unlink(missing_ok=True)
    for old in (*library.glob("dump-*"), *library.glob(".dump-*")):  # the latter of who was ended while it wrote
        if old.name != name:
            old.unlink()


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """The file as a whole, in the place of what was there; also after a power cut: a shell executes an empty file with
    success."""
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(mode)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


class Dump:
    """`content` is the file that a launcher maps; `launcher` is that program; `files` are path, modification time and
    size of what the process was made of. Raises LookupError where there is a
    function of the vDSO that nothing stands in for, or no vDSO, and OSError where the process cannot be read."""

    def __init__(self, known: dict[str, int], files: list[tuple[str, int, int]]) -> None:
        self.files = files
        self._known = known
        self._rows: list[bytes] = []
        self._heap_end = 0
        content = bytearray()
        with open(f"/proc/{known['pid']}/mem", "rb", buffering=0) as memory:
            self._stack, self._resume = struct.unpack("=2Q", os.pread(memory.fileno(), 16, known["place"]))
            mappings = list(_mappings(known["pid"]))
            vdso_at, vdso_end = {name: (start, end) for start, end, _, name in mappings}["[vdso]"]
            vdso = vdso_at, os.pread(memory.fileno(), vdso_end - vdso_at, vdso_at)
            for start, end, protection, name in mappings:
                data = bytearray(os.pread(memory.fileno(), end - start, start))
                if len(data) != end - start:
                    raise OSError(errno.EIO, f"read {name or 'memory'} of process {known['pid']}")
                if name == "[vdso]":
                    protection = PROT_READ  # noqa: PLW2901 - what is kept of it is read, not called
                elif not protection & PROT_EXEC:
                    _replace_pointers(data, *vdso, known)
                for at, length, is_empty in _runs(data):
                    flags = MAP_PRIVATE | _MAP_FIXED_NOREPLACE | (_MAP_ANONYMOUS if is_empty else 0)
                    offset = 0 if is_empty else len(content)
                    if name == "[heap]":
                        self._heap_end = end
                    self._rows.append(dumped.ROW.pack(start + at, length, protection, flags, offset))
                    if not is_empty:
                        content += data[at : at + length]
        self.content = bytes(content)

    def launcher(self, path: Path, slow: Path) -> bytes:
        """The program in front of the table."""
        said = f"{slow.name}: cannot execute {slow}\n".encode()
        texts = [os.fsencode(path) + b"\0", os.fsencode(slow) + b"\0", said]
        entry = _BASE + elf.headers_size(heap=True)
        address = entry + len(dumped.LAUNCHER) + dumped.DATA.size + len(self._rows) * dumped.ROW.size
        addresses = [address, address + len(texts[0]), address + len(texts[0]) + len(texts[1])]
        known = self._known
        data = dumped.DATA.pack(
            *(known["block"], known["tid"], known["words"], known["brk"], self._stack, self._resume),
            *(*addresses, len(said), len(self.content), len(self._rows)),
        )
        body = dumped.LAUNCHER + data + b"".join(self._rows) + b"".join(texts)
        return elf.program(_BASE, body, self._heap_end)


def _mappings(pid: int) -> Iterator[tuple[int, int, int, str]]:
    """Start, end, protection and name of what a resumed process has as well."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            addresses, permissions, _, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            protection = sum(bit for letter, bit in _PROT.items() if letter in permissions)
            if protection and (not name or name[0] in _KEPT or name[0][0] != "["):
                yield start, end, protection, "".join(name)


def _replace_pointers(data: bytearray, vdso_at: int, vdso: bytes, known: dict[str, int]) -> None:
    """Pointers to functions of the vDSO become such to their stand-ins."""
    functions = _functions(vdso)
    # Their upper six bytes: looked for as text, since memory is millions of words.
    for upper in range(vdso_at >> 16, (vdso_at + len(vdso) - 1 >> 16) + 1):
        text = upper.to_bytes(6, "little")
        at = data.find(text, 2)
        while at >= 0:
            start = at - 2
            word = int.from_bytes(data[start : start + 8], "little")
            if start % 8 == 0 and word - vdso_at in functions:
                data[start : start + 8] = known[functions[word - vdso_at]].to_bytes(8, "little")
            at = data.find(text, at + 1)


def _functions(vdso: bytes) -> dict[int, str]:
    """Name by offset of the functions that a vDSO has, without the prefix; see vdso(7) and elf(5)."""
    (sections,) = struct.unpack_from("<Q", vdso, 40)
    size, count = struct.unpack_from("<HH", vdso, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", vdso, sections + number * size) for number in range(count)]
    found = {}
    for _, kind, _, _, offset, length, link, _, _, entry in headers:
        if kind != _SHT_DYNSYM:
            continue
        for at in range(offset, offset + length, entry):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", vdso, at)
            if info & 15 == _STT_FUNC:
                text = headers[link][4] + name
                found[value] = vdso[text : vdso.index(b"\0", text)].decode().removeprefix("__vdso_")
    return found


def _runs(data: bytearray) -> Iterator[tuple[int, int, bool]]:
    """Offset and length of what a mapping is made of, and whether it is zeros; short runs of those count as filled."""
    began, is_empty = 0, not any(data[:_HOLE])
    for at in range(0, len(data), _HOLE):
        empty = data.count(0, at, at + _HOLE) == min(_HOLE, len(data) - at)
        if empty != is_empty:
            yield began, at - began, is_empty
            began, is_empty = at, empty
    yield began, len(data) - began, is_empty
