"""The log's shape, against a slow model of it: cuts, carries, bytes, rotation, a full disk (O22 O23 O24 O26 O27)."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from runtime.errors import RuntimeFailure
from runtime.shim import logfile
from runtime.shim.logfile import MAX_LINE, Lines, LogFile

LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) ([^\n]*)\n", re.S)


def read(path: Path) -> list[tuple[bytes, bytes, bytes]]:
    """(stream, tag, text) of every line; fails on anything else in the file."""
    raw, position, found = path.read_bytes(), 0, []
    while position < len(raw):
        match = LINE.match(raw, position)
        assert match, raw[position : position + 80]
        found.append((match[2], match[3], match[4]))
        position = match.end()
    return found


def reassemble(entries: list[tuple[bytes, bytes, bytes]], stream: bytes = b"stdout") -> list[bytes]:
    lines, current = [], b""
    for name, tag, text in entries:
        if name != stream:
            continue
        current += text
        if tag == b"F":
            lines.append(current)
            current = b""
    assert current == b"", "a P piece without its F"
    return lines


def expected(raw: bytes) -> list[bytes]:
    lines = raw.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def write(path: Path, chunks: list[bytes]) -> LogFile:
    log = LogFile(str(path))
    lines = Lines(log, "stdout")
    for chunk in chunks:
        lines.feed(chunk)
    lines.end()
    assert log.fd == -1
    return log


def test_o23_last_line_without_newline_is_one_full_line(tmp_path: Path) -> None:
    write(tmp_path / "log", [b"a", b"b", b"c"])
    assert read(tmp_path / "log") == [(b"stdout", b"F", b"abc")]


def test_empty_lines_and_empty_output(tmp_path: Path) -> None:
    write(tmp_path / "log", [b"\n\n", b"x\n\n"])
    assert [text for _, _, text in read(tmp_path / "log")] == [b"", b"", b"x", b""]
    write(tmp_path / "none", [])
    assert (tmp_path / "none").read_bytes() == b""


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 2 * MAX_LINE, 2 * MAX_LINE + 1, 70000])
@pytest.mark.parametrize("step", [1 << 20, MAX_LINE, 4096, 1000])
@pytest.mark.parametrize("ended", [True, False])
def test_o24_lines_around_the_limit_are_cut_into_p_pieces_and_one_f(
    tmp_path: Path, length: int, step: int, ended: bool
) -> None:
    raw = b"first\n" + bytes(97 + n % 23 for n in range(length)) + (b"\nlast\n" if ended else b"")
    write(tmp_path / "log", [raw[at : at + step] for at in range(0, len(raw), step)])
    entries = read(tmp_path / "log")
    assert reassemble(entries) == expected(raw)
    pieces = [text for _, tag, text in entries if tag == b"P"]
    assert all(len(text) == MAX_LINE for text in pieces) and len(pieces) == (length - 1) // MAX_LINE
    assert all(0 < len(text) <= MAX_LINE for _, _, text in entries)


def test_o24_random_lines_in_random_chunks(tmp_path: Path) -> None:
    dice = random.Random(7)
    for case in range(150):
        sizes = [dice.choice([0, 1, 5, 100, 5000, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 40000]) for _ in range(30)]
        raw = b"\n".join(dice.randbytes(size).replace(b"\n", b"\xff") for size in sizes)
        chunks, at = [], 0
        while at < len(raw):
            step = dice.choice([1, 7, 100, MAX_LINE, MAX_LINE + 1, 65536, 1 << 20])
            chunks.append(raw[at : at + step])
            at += step
        path = tmp_path / f"log{case}"
        write(path, chunks)
        assert reassemble(read(path)) == expected(raw), case
        path.unlink()


def test_o27_reopen_loses_nothing_and_splits_no_line(tmp_path: Path) -> None:
    dice = random.Random(3)
    lines = [b"%d " % number + b"x" * dice.choice([3, 90, 30000]) for number in range(400)]
    raw = b"\n".join(lines) + b"\n"
    log = LogFile(str(tmp_path / "log.0"))
    stream, files, at = Lines(log, "stdout"), 1, 0
    while at < len(raw):
        step = dice.choice([10, 1000, 20000, 60000])
        stream.feed(raw[at : at + step])
        at += step
        if dice.random() < 0.5:
            stream.reopen(LogFile(str(tmp_path / f"log.{files}")))
            files += 1
    stream.end()
    found = []
    for number in range(files):
        found += reassemble(read(tmp_path / f"log.{number}"))  # fails when a line's pieces are in two files
    assert found == lines
    assert files > 20


def test_o27_an_endless_line_does_not_keep_a_rotated_file_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logfile, "_SWITCH_AFTER", 100_000)
    old = LogFile(str(tmp_path / "old"))
    stream = Lines(old, "stdout")
    stream.feed(b"x" * 20000)
    stream.reopen(LogFile(str(tmp_path / "new")))
    assert old.fd >= 0
    for _ in range(10):
        stream.feed(b"x" * 20000)
    assert old.fd == -1
    stream.feed(b"\n")
    stream.end()
    assert sum(len(text) for name in ("old", "new") for _, _, text in read(tmp_path / name)) == 220_000


def test_o26_a_full_disk_drops_counts_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(logfile.time, "monotonic", lambda: now)
    log = LogFile(str(tmp_path / "log"))
    stream = Lines(log, "stdout")
    stream.feed(b"before\n")
    real, log.fd = log.fd, os.open("/dev/full", os.O_WRONLY)
    stream.feed(b"lost\n" * 10)
    os.close(log.fd)
    log.fd = real
    assert log.dropped > 50 and "ENOSPC" in log.reason
    dropped = log.dropped
    stream.feed(b"at once\n")  # what was freed just now is left to who frees more with it
    assert log.dropped > dropped and [text for *_, text in read(tmp_path / "log")] == [b"before"]
    now += 0.25
    stream.feed(b"after\n")
    stream.end()
    assert reassemble(read(tmp_path / "log")) == [b"before", b"after"]


def test_o26_a_torn_write_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(str(tmp_path / "log"))
    stream = Lines(log, "stdout")

    monkeypatch.setattr(logfile, "_PAUSE_S", 0)
    write = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", lambda fd, buffers: write(fd, b"".join(buffers)[:120]))
        patch.setattr(os, "write", full)
        stream.feed(b"one\ntwo\nthree\nfour\nfive\n")
    stream.feed(b"six\n")
    stream.end()
    assert reassemble(read(tmp_path / "log")) == [b"one", b"two", b"six"]
    assert log.dropped


@pytest.mark.parametrize("seed", range(20))
def test_o26_no_two_lines_are_read_as_one_however_full_the_disk_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    room = 0
    write = os.write

    def scarce(fd: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(28, "No space left on device")
        written = write(fd, bytes(data)[:room])
        room -= written
        return written

    monkeypatch.setattr(logfile, "_PAUSE_S", 0)
    monkeypatch.setattr(os, "write", scarce)
    monkeypatch.setattr(os, "writev", lambda fd, buffers: scarce(fd, b"".join(buffers)))
    sizes = [rng.choice([10, 300, MAX_LINE, 3 * MAX_LINE, 5 * MAX_LINE]) for _ in range(60)]
    sent = [b"%04d " % number + rng.randbytes(size).hex().encode()[:size] for number, size in enumerate(sizes)]
    raw = b"\n".join(sent) + b"\n"
    files = [tmp_path / "log0"]
    logs = [LogFile(str(files[0]))]
    stream = Lines(logs[0], "stdout")
    position = 0
    while position < len(raw):
        chunk = rng.choice([1000, 65536])
        room = rng.choice([0, 0, 700, 20000, 1 << 20, 1 << 20])
        stream.feed(raw[position : position + chunk])
        position += chunk
        if rng.random() < 0.1:
            files.append(tmp_path / f"log{len(files)}")
            logs.append(LogFile(str(files[-1])))
            stream.reopen(logs[-1])
    room = 1 << 30
    stream.feed(b"the last\n")
    stream.end()
    assert all(log.fd == -1 for log in logs) and logs[-1].dropped
    for path in files[:-1]:  # a file that was left while the disk was full may end with a piece
        if (entries := read(path)) and entries[-1][1] == b"P":
            path.write_bytes(path.read_bytes() + b"2020-01-01T00:00:00.000000000Z stdout F \n")
    found = [line for path in files for line in reassemble(read(path))]
    assert found.pop() == b"the last"
    numbers = [int(line[:4]) for line in found if line]
    assert numbers == sorted(set(numbers))
    assert all(sent[int(line[:4])].startswith(line) for line in found if line)


def test_a_link_a_fifo_and_a_directory_are_no_logs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ".", "missing/log"):
        with pytest.raises(RuntimeFailure, match="open log"):
            LogFile(str(tmp_path / name))
    assert not (tmp_path / "elsewhere").exists()
