"""A command ends without taking its modules apart: all that anybody could notice of an end happens none the less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import atexit, os, threading; from cri.cli import main\n"


def _ended(does: str, **options: object) -> subprocess.CompletedProcess[str]:
    """`ocid` as a process, whose command is the function `does`; what is left of a module says so on stderr."""
    left = "class Left:\n    def __del__(self): os.write(2, b'taken apart')\nleft = Left()\n"
    command = [sys.executable, "-c", f"{BEGIN}{left}{does}\nmain.ocid = does\nsys.exit(main.main())"]
    options = {"stdout": subprocess.PIPE, **options}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=buffered, **options)


def test_what_is_printed_arrives_and_so_does_the_code() -> None:
    done = _ended("def does(_): print('said', end=''); return 3")
    assert (done.stdout, done.stderr, done.returncode) == ("said", "", 3)


def test_threads_are_waited_for_and_what_was_registered_is_called() -> None:
    does = """
def does(_):
    go = threading.Event()
    threading.Thread(target=lambda: (go.wait(), print('thread'))).start()
    atexit.register(print, 'registered')
    go.set()
    return 0
"""
    done = _ended(does)
    assert (done.stdout, done.stderr, done.returncode) == ("thread\nregistered\n", "", 0)


def test_what_cannot_be_printed_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = _ended("def does(_): print('said'); return 0", stdout=full)
    assert done.returncode == 120 and "No space left on device" in done.stderr


def test_a_traceback_is_one() -> None:
    done = _ended("def does(_): raise KeyError('unforeseen')")
    assert done.returncode == 1 and "KeyError: 'unforeseen'" in done.stderr
