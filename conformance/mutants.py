"""python -m conformance.mutants [ROW…]: shows that the tests of the list of threats can fail.

Each entry of tests/mutants.toml takes one protection out of a copy of this tree and names the test that must fail then.
First all those tests must pass in the untouched copy. An entry whose text is no longer in its file is an error: the
protection has moved, and so must the entry. Runs in namespaces of its own, since a runtime without a protection leaves
things behind; ends with "N passed, N failed".
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance.isolated import reenter

ROOT = Path(__file__).resolve().parent.parent
CGROUPS = Path("/sys/fs/cgroup")
OURS = f"ocirun-mutant-{secrets.token_hex(3)}"  # what tests/bundles.py makes its cgroups' names of
FAILED = 1  # pytest's exit code when tests ran and some failed; any other is no verdict


@contextmanager
def copy() -> Iterator[Path]:
    """What git knows of the tree, as it is now, with an ocirun of its own."""
    with tempfile.TemporaryDirectory(prefix="ocid-mutants-") as name:
        place = Path(name)
        place.chmod(0o755)
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        for path in filter(None, listed.decode().split("\0")):
            if (ROOT / path).is_file():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes((ROOT / path).read_bytes())
        subprocess.run([sys.executable, "-m", "runtime.install", place / "prefix"], cwd=place, check=True)
        yield place


def run(place: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output. A source that was changed is taken before the installed byte code."""
    environment = {key: value for key, value in os.environ.items() if key != "OCID_REQUIRE_ALL"}
    environment |= {
        "OCID_RUNTIME": str(place / "prefix/bin/ocirun"),
        "OCID_TEST_CGROUP": OURS,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # hypothesis' would rewrite all of its own asserts each time
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]
    done = subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def sweep() -> None:
    """Ends what is in the cgroups of our tests, and removes them."""
    deadline = time.monotonic() + 5
    while fresh := cgroups():
        for path in fresh:
            with contextlib.suppress(OSError):
                for pid in (path / "cgroup.procs").read_text().split():
                    if pid != "0":  # in another pid namespace; to kill 0 is to kill oneself
                        os.kill(int(pid), signal.SIGKILL)
                path.rmdir()
        if time.monotonic() > deadline:
            raise SystemExit(f"[mutants] {fresh[-1]} cannot be removed")


def cgroups() -> list[Path]:
    """The directories of our tests in every hierarchy, deepest first."""
    # os.walk, unlike Path.glob, is fine with directories that others remove meanwhile.
    found = [directory for directory, _, _ in os.walk(CGROUPS) if f"/{OURS}-" in directory]
    return [Path(directory) for directory in sorted(found, key=lambda path: -path.count("/"))]


@contextmanager
def kept_null() -> Iterator[None]:
    """The machine's /dev/null as it was: one of the protections is what keeps its owner (threats S20)."""
    before = os.stat(os.devnull)
    try:
        yield
    finally:
        os.chown(os.devnull, before.st_uid, before.st_gid)
        os.chmod(os.devnull, before.st_mode & 0o7777)


def verdict(place: Path, mutant: dict[str, str]) -> str:
    """ "" when the test noticed, else what is wrong."""
    file = place / mutant["file"]
    before = file.read_text()
    if before.count(mutant["old"]) != 1:
        return f"its text is {before.count(mutant['old'])} times in {mutant['file']}: mend the entry"
    file.write_text(before.replace(mutant["old"], mutant["new"]))
    try:
        with kept_null():
            code, output = run(place, [mutant["test"]])
    finally:
        file.write_text(before)
        sweep()
    if code == FAILED:
        return ""
    if code == 0:
        return f"{mutant['test']} passes without it"
    return f"pytest exits with {code}:\n{output[-2000:]}"


def main(rows: list[str]) -> int:
    reenter("conformance.mutants", rows)
    mutants = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["mutant"]
    chosen = [one for one in mutants if not rows or one["row"] in rows]
    if unknown := set(rows) - {one["row"] for one in mutants}:
        print(f"no entry for {', '.join(sorted(unknown))} in tests/mutants.toml", file=sys.stderr)
        return 2
    failed = 0
    with copy() as place:
        tests = sorted({one["test"] for one in chosen})
        print(f"[mutants] {len(tests)} tests on the untouched tree", flush=True)
        code, output = run(place, tests)
        if code:
            print(output)
            print("[mutants] they must pass before anything is taken out")
            return 1
        for one in chosen:
            began = time.monotonic()
            problem = verdict(place, one)
            failed += bool(problem)
            print(
                f"[mutants] {one['row']:4} {one['what']}: {problem or 'noticed'} ({time.monotonic() - began:.1f} s)",
                flush=True,
            )
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
