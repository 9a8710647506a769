"""python -m conformance.bench [--quick] [--only NAME] [--strict] [PART…]

Measures in namespaces of its own (conformance.isolated) and prints one Markdown table. Images, layers and logs are on
an ext4 of their own, made for this run as mkfs makes them (see `_disk`), the daemons' states below /run, in memory, as
both have them where nobody says otherwise. Parts: lifecycle density pull logs streams link runtime. --strict: exit 1
when a budget is missed; a runtime that fails or loses output is an error in any case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conformance import daemons
from conformance.bench import density, lifecycle, link, runtimes, streams, transfer
from conformance.bench.subject import Subject, new_since, settled_pss
from conformance.bench.table import render
from conformance.cri_client import Names, connected
from conformance.images import BUSYBOX, layouts, push
from conformance.images.big import NAME as BIG
from conformance.images.big import big
from conformance.images.recipes import CACHE
from conformance.isolated import reenter
from conformance.registry import Registry, registry

PARTS = ("lifecycle", "density", "pull", "logs", "streams", "link", "runtime")
IMAGES = ("busybox",)
_RUN = Path("/run")  # ours alone
_DISK_BYTES = 24 << 30  # of a sparse file


def say(text: str) -> None:
    print(f"[bench] {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def _disk(base: Path) -> Iterator[Path]:
    """An ext4 in a file below `base`. That of a virtual machine may be one without a journal, which passes over each
    inode that was freed in the last five minutes, one by one, for every new file: after a suite that removes files by
    the hundred thousand a pull took four times as long there as on a disk like that of a node. What goes to it is not
    cached a second time, for the file, as no node's is: that copy was up to a fifth of a pull's processor time."""
    image, mountpoint = base / "disk.img", base / "disk"
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    attach = ["losetup", "--direct-io=on", "--find", "--show", str(image)]
    device = subprocess.run(attach, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        subprocess.run(["mount", device, mountpoint], check=True)
    finally:
        # One in use is detached when its last user has ended, however that ends (loop(4), LO_FLAGS_AUTOCLEAR).
        subprocess.run(["losetup", "--detach", device], check=True)
    try:
        yield mountpoint
    finally:
        # Lazily: what a daemon has left behind ends with these namespaces, and the loop device with the last of it.
        subprocess.run(["umount", "--lazy", mountpoint], check=True)


@contextmanager
def subject(name: str, directory: Path, images: Registry, cgroup: str) -> Iterator[Subject]:
    directory.mkdir()
    before = daemons.all_pids()
    with ExitStack() as stack:
        if name == "ocid":
            daemon = stack.enter_context(daemons.ocid(directory, bridge="bench0", state=_RUN / name))
        else:
            daemon = stack.enter_context(daemons.containerd(directory, images.address, state=_RUN / name))
        client = stack.enter_context(connected(daemon.socket))
        stack.callback(client.clear)
        idle = settled_pss(lambda: new_since(before))
        one = Subject(
            daemon,
            client,
            Names(name, directory / "logs", cgroup),
            images.reference(BUSYBOX),
            new_since(before),
        )
        one.values["idle"] = idle
        client.pull(one.image)
        yield one


def run(parts: Sequence[str], names: Sequence[str], quick: bool, base: Path) -> tuple[str, int]:
    with ExitStack() as stack:
        images = stack.enter_context(registry(base / "registry"))
        for layout in layouts(IMAGES):
            push(layout, images.address)
        if "pull" in parts:
            push(big(CACHE), images.address)
        stack.callback(daemons.remove_cgroup, f"bench-{base.name}")
        disk = stack.enter_context(_disk(base))
        subjects = [stack.enter_context(subject(name, disk / name, images, f"/bench-{base.name}")) for name in names]
        if "lifecycle" in parts:
            say("pod up and down, in turn")
            lifecycle.measure(subjects, 6 if quick else 20)
        if "density" in parts:
            say("pods at once, lists, memory")
            density.measure(subjects, 40)
        if "pull" in parts:
            say("pull of the large image, in turn")
            transfer.pull(subjects, images.reference(BIG), 1 if quick else 3, disk)
        if "logs" in parts:
            say("log throughput")
            transfer.logs(subjects, 100 if quick else 300)
        if "streams" in parts:
            say("exec streams")
            streams.measure(subjects, 300 if quick else 1000)
        for one in subjects:
            for note in one.notes:
                say(f"{one.name}: {note}")
        results = {one.name: one.values for one in subjects}
        if "link" in parts and "ocid" in names:
            say("pull over a simulated line")
            (base / "link").mkdir()
            results["ocid"]["link"], words = link.measure(base / "link", 240)
            say(f"line: {words}")
        if "runtime" in parts and "ocid" in names:
            say("ocirun and runc, in turn")
            (base / "runtimes").mkdir()
            for key, (peer, ours) in runtimes.measure(base / "runtimes", 10 if quick else 30).items():
                results.setdefault("containerd", {})[key] = peer
                results["ocid"][key] = ours
        return render(results)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: shows that it works, not what it does")
    parser.add_argument("--only", choices=("ocid", "containerd"), help="measure one of the two")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a budget is missed")
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: one of {', '.join(PARTS)}")
    parts = args.parts or PARTS
    layouts(IMAGES)  # before the namespaces: packages come over the network
    if "pull" in parts:
        say("the large image: made once, kept in .cache")
        big(CACHE)
    reenter("conformance.bench", sys.argv[1:])
    names = [args.only] if args.only else ["containerd", "ocid"]
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        table, missed = run(parts, names, args.quick, Path(directory))
    print(table)
    if args.output:
        args.output.write_text(table + "\n")
    if missed:
        say(f"{missed} budget(s) missed")
    return 1 if missed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
