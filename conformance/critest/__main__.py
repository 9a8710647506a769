"""conformance/run critest [--runtime ocid|containerd]… [--mode spdy|websocket|parallel]… [--repeat N] [--focus WORDS]

critest of cri-tools, in namespaces of its own, against ocid and, to compare the time, Debian's containerd; images come
from a registry on loopback that stands for every other one (hosts.toml). Prints what each run came to, every spec that
was skipped with the reason, and what went wrong with its output. Exit code 1 when anything did, when something is left
over, or when ocid takes longer than containerd for the specs that both pass.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conformance import daemons, leaks
from conformance.critest.judge import Verdict, compare, judge
from conformance.critest.tool import MODES, PASSED, SKIPPED, Run, RunFailed, built, play
from conformance.harness import expectations
from conformance.images import push
from conformance.images.critest import SANDBOX, critest
from conformance.isolated import reenter
from conformance.registry import registry

EXPECTED = Path(__file__).parent / "expected.toml"
RUNTIMES = ("ocid", "containerd")
# The runtimes in their turn, as .ci/run has it: all modes for ours, and one to compare with.
PLAN = (("ocid", "spdy"), ("containerd", "spdy"), ("ocid", "websocket"), ("ocid", "parallel"))
OUTPUT_LINES = 40


@contextmanager
def _served(runtime: str, directory: Path, address: str) -> Iterator[daemons.Daemon]:
    """The runtime below `directory`, to which every registry is the one at `address`."""
    certificates = directory / "certs.d"
    (certificates / "_default").mkdir(parents=True)
    mirror = f'server = "http://{address}"\n[host."http://{address}"]\ncapabilities = ["pull", "resolve"]\n'
    (certificates / "_default" / "hosts.toml").write_text(mirror)
    with ExitStack() as stack:
        if runtime == "ocid":
            (directory / "conf.d").mkdir()
            (directory / "conf.d" / "images.toml").write_text(f'[image]\nhosts_dirs = ["{certificates}"]\n')
            yield stack.enter_context(daemons.ocid(directory))
        else:
            yield stack.enter_context(daemons.containerd(directory, address, pause=f"{address}/{SANDBOX}"))


class Lane:
    """Plays runs and keeps what they came to."""

    def __init__(self, base: Path, words: list[str], seed: int) -> None:
        self.base, self.words, self.seed = base, words, seed
        self.critest, self.ginkgo = built("critest"), built("ginkgo")
        self.failed = 0
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self._count = 0

    def run(self, runtime: str, mode: str, address: str) -> None:
        self._count += 1
        directory = self.base / f"{self._count}-{runtime}"
        directory.mkdir()
        before = leaks.Machine.now()
        with _served(runtime, directory, address) as daemon:
            print(f"\n--- {runtime}, {mode}", flush=True)
            try:
                run = play(self.critest, self.ginkgo, daemon.socket, directory / "critest", mode, self.words, self.seed)
            except RunFailed as error:
                print(f"FAIL  {error}\n{_end(daemon.log)}", flush=True)
                self.failed += 1
                return
            verdict = self._judged(runtime, run)
            self.verdicts[runtime, mode] = verdict
            if verdict.wrong:
                print(_end(daemon.log), flush=True)
        if runtime == "ocid":
            for line in leaks.settled(before):
                print(f"FAIL  left over: {line}", flush=True)
                self.failed += 1

    def _judged(self, runtime: str, run: Run) -> Verdict:
        document = EXPECTED.read_text()
        expected = expectations.read(document, runtime, _version(runtime), run.names)
        least = 0 if self.words else tomllib.loads(document)["executed"][runtime]
        verdict = judge(run, expected, least)
        for name, reason in (*verdict.known, *verdict.skipped):
            print(f"{'known' if (name, reason) in verdict.known else 'skip':5} {name}: {reason}")
        for line in verdict.wrong:
            print(f"FAIL  {line}")
        for spec in run.specs:
            if spec.state not in (PASSED, SKIPPED) and spec.name not in expected:
                print(f"--- {spec.name}\n" + "\n".join(spec.output.splitlines()[-OUTPUT_LINES:]))
        self.failed += len(verdict.wrong)
        print(f"{verdict}, {run.seconds:.1f} s (seed {run.seed})", flush=True)
        return verdict


def _version(runtime: str) -> tuple[int, ...]:
    asked = [daemons.command_path(runtime), "version" if runtime == "ocid" else "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return next(expectations.version_of(word) for word in said.split() if word[0].isdigit())


def _end(log: Path) -> str:
    return f"--- the end of {log.name}:\n{log.read_text(errors='replace')[-4000:]}"


def _compared(lane: Lane) -> None:
    for mode in MODES:
        ours, theirs = (lane.verdicts.get((runtime, mode)) for runtime in RUNTIMES)
        if ours and theirs:
            count, mine, other = compare(ours, theirs)
            print(f"\n{mode}: {count} specs that both pass: ocid {mine:.1f} s, containerd {other:.1f} s")
            if mine > other:
                print("FAIL  ocid is slower")
                lane.failed += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="conformance/run critest", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--runtime", choices=RUNTIMES, action="append", help="only this one; again for more")
    parser.add_argument("--mode", choices=tuple(MODES), action="append", help="only this way to run it; again for more")
    parser.add_argument("--repeat", type=int, default=1, help="how often (default: 1)")
    parser.add_argument("--focus", action="append", default=[], help="only specs with this in their name (a pattern)")
    parser.add_argument("--layout", type=Path, help="the images, where they cannot be made (default: they are made)")
    parser.add_argument("--seed", type=int, default=0, help="the order of an earlier run")
    args = parser.parse_args()
    if args.runtime or args.mode:
        plan = [(runtime, mode) for mode in args.mode or ["spdy"] for runtime in args.runtime or ["ocid"]]
    else:
        plan = list(PLAN)
    built("critest"), built("ginkgo")
    images = args.layout or critest()
    reenter("conformance.critest", sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it takes daemons and files with it
    with tempfile.TemporaryDirectory(prefix="critest-") as base:
        lane = Lane(Path(base), args.focus, args.seed)
        with registry(Path(base) / "registry") as served:
            push(images, served.address)
            for runtime, mode in plan * args.repeat:
                lane.run(runtime, mode, served.address)
        _compared(lane)
    print(f"\ncritest: {'passed' if not lane.failed else f'{lane.failed} failed'}")
    return 1 if lane.failed else 0


if __name__ == "__main__":
    sys.exit(main())
