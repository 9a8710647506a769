"""A template: copies that equal it are given back, all others stay, and nothing is lost meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# A process of its own: whoever takes a template changes what all of its memory is.
PROLOGUE = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from runtime.linux import signals, template

def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0

def own_pages():  # present, and no file's: /proc/pid/pagemap
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps.readlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if "/memfd:ocid-template" in line and " rw-p " in line:
                entries = os.pread(pagemap.fileno(), (end - start) // 512, start // 512)
                for at in range(0, len(entries), 8):
                    entry = int.from_bytes(entries[at:at + 8], "little")
                    found += entry >> 63 & 1 and not entry >> 61 & 1
    return found

objects = [f"{{number}}" for number in range(20000)]
"""


def run(script: str) -> str:
    """What a script says in a fresh interpreter without anything else in it."""
    done = subprocess.run(
        [sys.executable, "-IS", "-c", PROLOGUE + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_what_equals_the_template_is_given_back() -> None:
    run("""
taken = template.take()

def child():
    before = own_pages()
    held = [(one, one) for one in objects]  # two references more of each, on hundreds of pages
    copied = own_pages()
    assert copied > before + 200, (before, copied)
    del held
    given = taken.give_back()
    kept = own_pages()
    assert given > 200 and kept < copied - 200, (before, copied, given, kept)
    assert objects == [f"{number}" for number in range(20000)]

forked(child)
""")


def test_all_pages_are_copied_at_once_and_are_what_they_were() -> None:
    run("""
taken = template.take()

def child():
    before = own_pages()
    taken.copy()
    copied = own_pages()
    assert before < copied // 2 and copied == taken.size // 4096, (before, copied, taken.size)
    assert objects == [f"{number}" for number in range(20000)]
    del before
    assert taken.give_back() > copied * 3 // 4
    taken.copy()  # who has given them back copies anew
    assert own_pages() == copied

forked(child)
""")


def test_what_differs_stays() -> None:
    run("""
import gc
marks = [bytearray(64) for _ in range(5000)]
taken = template.take()

def child():
    for turn in range(1, 6):
        for number, mark in enumerate(marks):
            if number % 3 == 0:
                mark[number % 64] = turn
        fresh = [str(number) * 3 for number in range(3000)]
        taken.give_back()
        assert fresh == [str(number) * 3 for number in range(3000)]
        for number, mark in enumerate(marks):
            assert mark[number % 64] == (turn if number % 3 == 0 else 0)
    gc.collect()

forked(child)
forked(child)
assert not any(map(any, marks))  # the parent's
""")


def test_allocations_grow_and_shrink_as_ever() -> None:
    """Arenas and the heap that a template was made of are taken from, given to the kernel, and grown again."""
    run("""
import gc
from runtime.linux.memory import malloc_trim
big = [bytes(1000) for _ in range(3000)]
small = [(number, str(number)) for number in range(40000)]
taken = template.take()

def child():
    global big, small
    for _ in range(3):
        big = small = None
        gc.collect()
        malloc_trim()
        taken.give_back()
        big = [bytes([number % 256]) * 1000 for number in range(6000)]
        small = [(number, str(number)) for number in range(80000)]
        lengthened = bytearray(300)
        for number in range(2000):
            lengthened.extend(bytes([number % 256]) * 300)
        taken.give_back()
        assert all(one == bytes([number % 256]) * 1000 for number, one in enumerate(big))
        assert all(one == (number, str(number)) for number, one in enumerate(small))
        assert all(lengthened[300 + 300 * number] == number % 256 for number in range(2000))

forked(child)
child()  # and who took it
""")


def test_no_signal_is_handled_between_a_look_and_a_step() -> None:
    run("""
masks = []

def watched(*arguments, read_to=template.read_to):
    masks.append(next(line for line in open("/proc/self/status") if line.startswith("SigBlk:")).split()[1])
    read_to(*arguments)

taken = template.take()
template.read_to = watched
signals.block(signals.SIGTERM)
taken.give_back()
possible = "fffffffe7ffbfeff"  # all but KILL, STOP, and the two of the C library
assert masks and set(masks) == {possible}, masks
assert open("/proc/self/status").read().split("SigBlk:")[1].split()[0] == f"{1 << 14:016x}"
""")


def test_a_template_can_be_changed_by_nobody() -> None:
    run("""
template.take()
mappings = [line.split() for line in open("/proc/self/maps") if "/memfd:ocid-template" in line]
assert any(" rw-p " in " ".join(words) for words in mappings)
start, end = (int(part, 16) for part in mappings[0][0].split("-"))
fd = os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDWR)
for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
    try:
        change()
    except PermissionError:
        continue
    raise AssertionError("changed")
assert fd == 3, "another fd was left open"
""")


def test_without_machine_code_there_is_none() -> None:
    run("""
template._make = None
template.rehearse(1)
assert template.take() is None
assert "ocid-template" not in open("/proc/self/maps").read()
""")


def test_memory_that_cannot_be_moved_stays_in_its_place() -> None:
    """What is not there any more, and what may not be mapped: the kernel refuses an address that is no page's."""
    run("""
regions = list(template._regions())
refused = (0x10000, 0x20000)
calls = []

def lamed(function, table, count, call=template._call):
    words = template._CALL.unpack_from(table, template._CALL.size)
    calls.append(words[1])
    if len(calls) == 2:
        words = (words[0], words[1] + 1, *words[2:])
        table = table[:template._CALL.size] + template._CALL.pack(*words)
    return call(function, table, count)

template._regions = lambda: [refused, *regions]
template._call, keep = lamed, template._call
taken = template.take()
template._call = keep
assert calls[0] == refused[0] and len(calls) > 3
moved = [address for address, _ in taken._regions]
assert moved == calls[2:], (moved, calls)
assert objects == [f"{number}" for number in range(20000)]
forked(taken.give_back)
assert len([str(number) for number in range(100000)]) == 100000
""")


def test_a_page_in_the_place_of_the_templates_keeps_what_it_holds() -> None:
    """As when the heap has shrunk and grown again: to give up such a page would leave zeros."""
    run("""
from runtime.linux.memory import map_file, map_room, read_to
fd = os.memfd_create("page")
os.write(fd, bytes(range(256)) * 32)
room = map_room(8192)
read_to(room, fd, 8192, 0)
taken = template.Template([(room, 2)], map_file(fd, 8192))
assert taken.give_back() == 0
with open("/proc/self/mem", "rb", buffering=0) as memory:
    assert os.pread(memory.fileno(), 8192, room) == bytes(range(256)) * 32
""")


def test_what_malloc_has_mapped_is_no_part_of_a_template() -> None:
    """It would grow over the end of the file, into a SIGBUS."""
    run("""
lengthened = [bytearray(200_000) for _ in range(20)]
template.take()
for one in lengthened:
    one.extend(bytes(20_000_000))
    one[-1] = 1
    del one[:]
""")
