"""One boot: qemu with the image, the clone's disk and a swap disk, until it ends or its time is over.

    qemu ── virtio-blk vda: root (every write goes to a temporary file), vdb: clone, vdc: swap
         ── virtio port org.ocid.output ── our stdout
         ── virtio port org.ocid.result ── a file with "exit N"
         ── ttyS0 ── a file: kernel and systemd, shown when something went wrong

Invariant: exit code 0 only if the machine itself said so; a panic, a hang and silence are failures. The machine's life
is bound to ours, and what it writes is gone with its directory.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MEMORY_MIB = 2048
SWAP_MIB = 256
# Without what guards a kernel from itself, and a fifth level of page tables: each costs at every access or call.
_PROCESSOR = "max,la57=off,smap=off,smep=off,umip=off"
_LINES = 40  # of the console, after a failure
_COMMAND_LINE = " ".join(
    (
        "console=ttyS0 quiet panic=-1 rw",
        # What the lane is about: one cgroup hierarchy, and AppArmor as the security module.
        "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all apparmor=1 security=apparmor",
        "hugepages=4 systemd.show_status=error mitigations=off",
        # Emulated processors have one clock, but the kernel finds it out of step and would ask a device instead, for
        # which both processors wait for one another.
        "tsc=reliable clocksource=tsc no_timer_check",
        # Zeroed pages, accounts of calls and grace periods that are in no hurry: of use on other machines.
        "init_on_alloc=0 audit=0 nowatchdog kfence.sample_interval=0 rcupdate.rcu_expedited=1",
    )
)


def boot(image: Path, directory: Path, timeout_s: float, *, shell: bool = False) -> int:
    """Runs the machine; `directory` has clone.ext4 and gets the rest. The exit code of what ran inside, or 1."""
    console, result = directory / "console.log", directory / "result"
    with (directory / "swap").open("wb") as swap:
        swap.truncate(SWAP_MIB << 20)
    reader, writer = os.pipe()
    child = subprocess.Popen(
        # Without us it would run on.
        ["setpriv", "--pdeathsig", "KILL", *qemu(image, directory, writer, console, result, shell=shell)],
        stdin=None if shell else subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(directory)},
        pass_fds=(writer,),
    )
    os.close(writer)
    try:
        problem = _relay(reader, time.monotonic() + timeout_s) and f"the machine did not end within {timeout_s:.0f} s"
        if not problem and child.wait():
            problem = f"qemu exited with {child.returncode}"
    finally:
        child.kill()
        child.wait()
        os.close(reader)
    said = result.read_text(errors="replace") if result.exists() else ""
    code = re.search(r"^exit (\d+)$", said, re.MULTILINE)
    if code is not None and not problem:
        return int(code[1])
    if console.exists():
        tail = console.read_text(errors="replace").splitlines()[-_LINES:]
        print("\n".join(["hack/vm: the end of the machine's console:", *tail]), file=sys.stderr)
    print(f"hack/vm: {problem or 'the machine ended without a result'}", file=sys.stderr)
    return 1


def _relay(reader: int, deadline: float) -> bool:
    """Copies the machine's output to ours until it ends. True when the deadline came first."""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            return False
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return True


def qemu(image: Path, directory: Path, output: int, console: Path, result: Path, *, shell: bool) -> Sequence[str]:
    """The command line."""
    disks = (
        f"file={image}/root.ext4,format=raw,snapshot=on,cache=unsafe",
        f"file={directory}/clone.ext4,format=raw,readonly=on",
        f"file={directory}/swap,format=raw,cache=unsafe",
    )
    words = [
        "qemu-system-x86_64",
        "-accel",
        "tcg,thread=multi,tb-size=512",
        "-machine",
        "q35",
        "-cpu",
        _PROCESSOR,
        "-smp",
        "2",
    ]
    words += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-reboot", "-display", "none", "-nic", "none"]
    words += ["-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd", "-append", _COMMAND_LINE]
    for disk in disks:
        words += ["-drive", f"{disk},if=virtio"]
    words += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    words += ["-chardev", f"file,id=output,path=/dev/fd/{output}"]
    words += ["-device", "virtserialport,chardev=output,name=org.ocid.output"]
    words += [
        "-chardev",
        f"file,id=result,path={result}",
        "-device",
        "virtserialport,chardev=result,name=org.ocid.result",
    ]
    words += ["-serial", "mon:stdio" if shell else f"file:{console}"]
    return words
