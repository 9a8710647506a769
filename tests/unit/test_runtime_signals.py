"""What a process that goes on from a dump knows of signals is what the kernel has for it, as in a started one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the interpreter knows is of another process: dispositions are changed behind its back.
PROGRAM = f"""
import ctypes, json, signal, sys
sys.path.append({str(ROOT)!r})
from runtime.linux import signals
libc = ctypes.CDLL(None)
libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
for number in (signal.SIGTERM, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
for number, action in json.loads(sys.argv[1]):
    libc.signal(number, action)
signals.as_at_start()
print(json.dumps([str(signal.getsignal(number)) for number in range(1, signal.NSIG)]))
print(open("/proc/self/status").read())
"""
STARTED = """
import json, signal
print(json.dumps([str(signal.getsignal(number)) for number in range(1, signal.NSIG)]))
print(open("/proc/self/status").read())
"""
DEFAULT, IGNORED = 0, 1


def told(program: str, *words: str, ignored: str = "") -> tuple[list[str], list[str]]:
    """What Python knows of each signal, and what the kernel ignores and catches."""
    # Whoever runs the tests may ignore some: a shell does for what it starts in the background.
    dispositions = ["--default-signal", *([f"--ignore-signal={ignored}"] if ignored else [])]
    command = ["env", *dispositions, sys.executable, "-c", program, *words]
    known, _, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")
    lines = [line for line in status.splitlines() if line.startswith(("SigIgn:", "SigCgt:"))]
    return [one.partition(" at 0x")[0] for one in json.loads(known)], lines


def test_nothing_that_only_the_other_process_ignored_is_ignored() -> None:
    changed = json.dumps([(number, DEFAULT) for number in (2, 3, 13, 15, 25)])  # as execve(2) leaves what is handled
    assert told(PROGRAM, changed) == told(STARTED)


def test_what_is_ignored_for_this_one_stays_so_and_is_known() -> None:
    changed = json.dumps([*((number, DEFAULT) for number in (3, 13, 15, 25)), (1, IGNORED), (2, IGNORED)])
    assert told(PROGRAM, changed) == told(STARTED, ignored="HUP,INT")
