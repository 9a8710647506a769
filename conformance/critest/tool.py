"""critest as a program: built from conformance/go.mod, run once against a socket, its report read back.

It is a Ginkgo suite. Serially it is its own runner; `-parallel` wants the `ginkgo` command of the same module in $PATH.
Everything it writes (its report, volumes, log directories) stays below one directory: $TMPDIR is set to it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPORT = "report.json"
PARALLEL = 4
# For a machine that is much slower than any seen; a run takes about a minute and a half.
RUN_S = 1800
WEBSOCKET = ("-websocket-exec", "-websocket-attach", "-websocket-portforward")
MODES: dict[str, tuple[str, ...]] = {
    "spdy": (),
    "websocket": WEBSOCKET,
    "parallel": (f"-parallel={PARALLEL}",),
}
# States of types.SpecState in Ginkgo's reports.
PASSED, SKIPPED, PENDING = "passed", "skipped", "pending"
LEAF = "It"


@dataclass(frozen=True, slots=True)
class Spec:
    """What became of one spec; `text` is its failure or the reason it gives for skipping itself."""

    name: str
    state: str
    seconds: float
    text: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the suite: `names` are all specs it has, also those that a filter took out; `seed` orders them the
    same way again (-ginkgo.seed)."""

    specs: tuple[Spec, ...]
    names: frozenset[str]
    seconds: float
    seed: int


class RunFailed(Exception):
    """critest ended without a report that could be read: says how, with the end of its output."""


def compiler() -> str | None:
    """The Go compiler that hack/crictl would take."""
    return os.environ.get("GO") or shutil.which("go") or shutil.which("/usr/local/go/bin/go")


def built(tool: str) -> Path:
    """critest or ginkgo at the pinned version, built when it is not there yet."""
    result = subprocess.run([ROOT / "hack" / "crictl", tool], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{tool} cannot be built: see above")
    return Path(result.stdout.strip())


def play(
    critest: Path, ginkgo: Path, socket: Path, directory: Path, mode: str, words: Sequence[str] = (), seed: int = 0
) -> Run:
    """Runs the suite against `socket`, with its files below `directory`, which must not exist."""
    commands = directory / "bin"
    commands.mkdir(parents=True)
    (commands / "ginkgo").symlink_to(ginkgo)
    # AppArmor's specs load their profiles through it.
    (commands / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (commands / "sudo").chmod(0o755)
    chosen = [f"-ginkgo.focus={word}" for word in words] + ([f"-ginkgo.seed={seed}"] if seed else [])
    command = [
        str(critest),
        f"-runtime-endpoint=unix://{socket}",
        f"-ginkgo.json-report={REPORT}",
        "-ginkgo.no-color",
        *MODES[mode],
        *chosen,
    ]
    environment = {**os.environ, "TMPDIR": str(directory), "PATH": f"{commands}:{os.environ['PATH']}"}
    log = directory / "output"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            process_group=0,
        )
        try:
            code = process.wait(RUN_S)
        except BaseException:
            # With the group its parallel runners end as well.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    # Serially it is written where the suite runs, in parallel beside the link that ginkgo is given as its suite.
    reports = [directory / REPORT, *directory.glob(f"cri-test*/{REPORT}")]
    for path in reports:
        if path.is_file():
            return read(json.loads(path.read_text()))
    raise RunFailed(f"critest exits {code} without a report: {log.read_text(errors='replace')[-2000:]}")


def read(document: list[dict[str, Any]]) -> Run:
    """A report of Ginkgo as values. What a filter took out has no place in it: those are benchmarks, and what the
    words of a focus leave out."""
    (suite,) = document
    if reasons := suite["SpecialSuiteFailureReasons"]:
        raise RunFailed(f"critest: {'; '.join(reasons)}")
    specs, names = [], set()
    for one in suite["SpecReports"]:
        text = one.get("Failure", {}).get("Message", "")
        if one["LeafNodeType"] != LEAF:
            if one["State"] not in (PASSED, SKIPPED):
                raise RunFailed(f"critest: {one['LeafNodeType']}: {text}")
            continue
        name = " ".join([*(one["ContainerHierarchyTexts"] or ()), one["LeafNodeText"]]).removeprefix("[k8s.io] ")
        names.add(name)
        if one["State"] == PENDING or (one["State"] == SKIPPED and not text):
            continue
        specs.append(Spec(name, one["State"], one["RunTime"] / 1e9, text, one.get("CapturedGinkgoWriterOutput", "")))
    return Run(tuple(specs), frozenset(names), suite["RunTime"] / 1e9, suite["SuiteConfig"]["RandomSeed"])
