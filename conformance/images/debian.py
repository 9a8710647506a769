"""Debian packages as layer entries: `apt-get download`, then the package's own tar stream, with /bin, /lib, /lib64 and
/sbin merged into /usr as Debian 12 has them. No maintainer script runs; nothing is installed."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from conformance.images.layer import Entry, directory, symlink

MERGED = ("bin", "lib", "lib64", "sbin")
# With pauses that grow: a name that cannot be resolved for a moment is no reason to fail.
RETRIES = ("-o", "Acquire::Retries=8")


def download(packages: Sequence[str], cache: Path) -> dict[str, Path]:
    """The .deb of each package, from `cache` where it is already there."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not _cached(name, cache)]
    if missing:
        # The files belong to us, so apt need not drop to its own user, who could not write here.
        fetch = ["apt-get", "download", "-qq", *RETRIES, "-o", "APT::Sandbox::User=root", *missing]
        first = subprocess.run(fetch, cwd=cache, capture_output=True, text=True, check=False)
        if first.returncode != 0:
            # Stale package lists name versions that the archive has dropped.
            subprocess.run(["apt-get", "update", "-qq", *RETRIES], check=True, capture_output=True)
            again = subprocess.run(fetch, cwd=cache, capture_output=True, text=True, check=False)
            if again.returncode != 0:
                raise RuntimeError(f"download packages {', '.join(missing)}: {again.stderr.strip()}")
    found = {name: _cached(name, cache) for name in packages}
    return {name: path for name, path in found.items() if path}


def _cached(name: str, cache: Path) -> Path | None:
    return next(iter(sorted(cache.glob(f"{name}_*.deb"), reverse=True)), None)


def base_directories() -> list[Entry]:
    """The root of a merged-/usr system."""
    plain = ("dev", "etc", "home", "opt", "proc", "run", "srv", "sys", "usr", "var", "var/lib", "var/log", "var/cache")
    merged = [directory(f"usr/{name}") for name in MERGED] + [symlink(name, f"usr/{name}") for name in MERGED]
    return [
        *(directory(name) for name in plain),
        directory("root", 0o700),
        directory("tmp", 0o1777),
        directory("var/tmp", 0o1777),
        *merged,
        symlink("var/run", "/run"),
    ]


def contents(deb: Path) -> Iterator[Entry]:
    """The entries of one package, directories first as the package has them."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for info in tar:
                path = _merged(info.name)
                if not path or path in MERGED or (info.isdir() and path.removeprefix("usr/") in MERGED):
                    continue
                handle = tar.extractfile(info) if info.isreg() else None
                target = _merged(info.linkname) if info.islnk() else info.linkname
                yield Entry(
                    path, info.type, info.mode, handle.read() if handle else b"", target, info.uid, info.gid
                )  # fmt: skip
    if process.returncode != 0:
        raise RuntimeError(f"read package {deb.name}: dpkg-deb exits with {process.returncode}")


def _merged(name: str) -> str:
    path = name.removeprefix("./").strip("/")
    return f"usr/{path}" if path.split("/")[0] in MERGED else path
