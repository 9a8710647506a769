"""python -m hack.usual: writes runtime/usual.json, the functions that ocirun calls for a usual container.

Runs each command as root on a bundle like those that engines write, with a profile function in every process of it.
What is missing from the file costs a start a few microseconds, what is too much as well: run it after larger changes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from conformance.bench.runtimes import bundle
from runtime import cli, install

ID = "ocirun-usual"
RESOURCES = {
    "memory": {"limit": 64 << 20},
    "cpu": {"shares": 512, "quota": 50000, "period": 100000},
    "pids": {"limit": 64},
}
# Goes before boot.py's last line. What a process called is written when it is about to execute a program, or at its
# end, to stderr: the one file that is open in all of them.
PROFILE = """
def _profiled():
    called, leave = set(), posix._exit
    def tell():
        sys.setprofile(None)
        text = "".join(f"called {code.co_filename} {code.co_qualname}\\n" for code in called)
        for start in range(0, len(text), 4000):
            posix.write(2, text[start:start + 4000].encode())
    def profile(frame, event, argument):
        if event == "call":
            called.add(frame.f_code)
            if frame.f_code.co_name == "execveat":
                tell()
    def at_end(code):
        tell()
        leave(code)
    posix._exit = at_end
    sys.setprofile(profile)
_profiled()
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        ocirun = installed(place)
        plain, limited = bundle(place / "plain"), bundle(place / "limited")
        change(limited, resources=RESOURCES)

        def call(command: str, *words: str) -> None:
            # What a created container's init says comes while others run, and belongs to create.
            with (place / f"said-{command}").open("ab") as said:
                words = (ocirun, "--root", f"{place}/state", command, *words)
                subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, check=True)

        for path in (plain, limited):
            call("run", "--bundle", str(path), ID)
            call("run", "--detach", "--pid-file", f"{place}/pid", "--bundle", str(path), ID)
            call("delete", ID)
        (plain / "rootfs/bin/sleep").hardlink_to(plain / "rootfs/bin/true")
        change(plain, args=["/bin/sleep", "1000"])
        call("create", "--pid-file", f"{place}/pid", "--bundle", str(plain), ID)
        call("start", ID)
        call("exec", ID, "/bin/true")
        call("exec", "--detach", "--pid-file", f"{place}/pid", ID, "/bin/true")
        call("delete", "--force", ID)
        usual = {name: called(place / f"said-{name}") for name, (_, _, enters) in cli.COMMANDS.items() if enters}
    install.USUAL.write_text(json.dumps(usual, indent=1) + "\n")


def installed(place: Path) -> str:
    """The command with every function as the source has it, and the profile function in its boot.py."""
    source = install.boot_source
    install.boot_source = lambda modules: source(modules).replace("\n\nmain(", PROFILE + "\n\nmain(")
    install.USUAL.write_text("{}")
    install.main([str(place)])
    return str(place / "lib/ocirun/ocirun")  # the one that starts an interpreter


def change(place: Path, *, args: list[str] | None = None, resources: Mapping[str, object] | None = None) -> None:
    document = json.loads((place / "config.json").read_text())
    if args is not None:
        document["process"]["args"] = args
    if resources is not None:
        document["linux"]["resources"] |= resources
    (place / "config.json").write_text(json.dumps(document))


def called(said: Path) -> dict[str, list[str]]:
    """By module, the names of the functions of ours that were called."""
    found: dict[str, set[str]] = {}
    for line in said.read_text().splitlines():
        word, path, name = line.split(" ", 2)
        assert word == "called", line
        if Path(path).is_relative_to(install.ROOT / "runtime") and "<" not in name:
            found.setdefault(install.module_name(Path(path)), set()).add(name)
    return {module: sorted(names) for module, names in sorted(found.items())}


if __name__ == "__main__":
    main()
