"""The images of the tests and the demonstration, by name.

    busybox   one gzip layer in the upstream way: the first applet is the file, every other a hard link to it
    dynamic   bash and coreutils with the libraries they are linked to; Docker's second manifest schema
    nginx     serves on 80, pid file in /var/run; a gzip, a zstd and an uncompressed layer, the last with whiteouts
    layers    what layers can hold: opaque directories, xattrs, set-uid, devices, fifos, long names, links
    multi     an index: the busybox for amd64 beside one for arm64 that must not be chosen here
    pause     busybox that sleeps, for runtimes that need a sandbox image

`layouts` builds what is missing into .cache/images, under a key of these sources and the packages' versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conformance.images.debian import base_directories, contents, download
from conformance.images.layer import (
    GZIP,
    NONE,
    ZSTD,
    Entry,
    directory,
    file,
    hardlink,
    opaque,
    symlink,
    whiteout,
    write_layer,
)
from conformance.images.layout import Config, Layout

CACHE = Path(__file__).parents[2] / ".cache"
BUSYBOX = "busybox:1"
LIBC = ("libc6", "libgcc-s1", "gcc-12-base", "libcrypt1")
NGINX = ("nginx", "nginx-common", "libpcre2-8-0", "libssl3", "zlib1g")
SHELL = ("bash", "coreutils", "libtinfo6", "libacl1", "libattr1", "libgmp10", "libselinux1", "libpcre2-8-0")
PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\n"
    "daemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
    "www-data:x:33:33:www-data:/var/www:/bin/false\n"
    "operator:x:1000:1000::/home/operator:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/home:/bin/false\n"
)
GROUP = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nstaff:x:50:operator\noperator:x:1000:\nnogroup:x:65534:\n"
# With the port in place of PORT.
NGINX_CONF = """\
daemon off;
user www-data;
worker_processes 1;
pid /var/run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 256; }
http {
    access_log /dev/stdout;
    types { text/html html; }
    server {
        listen PORT default_server;
        root /usr/share/nginx/html;
    }
}
"""
PAGE = "<!doctype html><title>ocid</title><p>Hello from a pod.\n"


class Packages:
    """The downloaded packages and where they are."""

    def __init__(self, cache: Path, others: Sequence[str] = ()) -> None:
        self.files = download(sorted({"busybox-static", *LIBC, *NGINX, *SHELL, *others}), cache / "debs")

    @property
    def key(self) -> str:
        """Changes with any package version and with these sources."""
        digest = hashlib.sha256("\n".join(sorted(path.name for path in self.files.values())).encode())
        for source in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        return digest.hexdigest()[:16]

    def entries(self, *names: str) -> Iterator[Entry]:
        seen: set[str] = set()
        for name in names:
            for entry in contents(self.files[name]):
                if entry.kind != tarfile.DIRTYPE or entry.path not in seen:
                    seen.add(entry.path)
                    yield entry


def accounts() -> list[Entry]:
    return [
        directory("etc"),
        file("etc/passwd", PASSWD),
        file("etc/group", GROUP),
        file("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ]


def applets(binary: bytes, work: Path) -> list[str]:
    """What this busybox can do, as it says itself."""
    program = work / "busybox-probe"
    program.write_bytes(binary)
    program.chmod(0o755)
    listing = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    program.unlink()
    return [name for name in listing.split() if name != "busybox"]


def busybox_entries(packages: Packages, work: Path) -> list[Entry]:
    binary = next(entry.data for entry in packages.entries("busybox-static") if entry.path == "usr/bin/busybox")
    first = "bin/["
    others = [name for name in applets(binary, work) if name != "["]
    return [
        directory("bin"),
        file(first, binary, 0o755),
        hardlink("bin/busybox", first, 0o755),
        *(hardlink(f"bin/{name}", first, 0o755) for name in others),
        directory("dev"),
        *accounts(),
        directory("home/operator", uid=1000, gid=1000),
        directory("proc"),
        directory("root", 0o700),
        directory("run"),
        directory("sys"),
        directory("tmp", 0o1777),
        directory("usr"),
        directory("usr/bin"),
        symlink("usr/bin/env", "/bin/env"),
        directory("var"),
        symlink("var/run", "/run"),
        directory("www"),
        file("www/index.html", PAGE),
    ]


def _busybox(packages: Packages, layout: Layout) -> None:
    base = layout.keep(write_layer(busybox_entries(packages, layout.scratch()), layout.scratch() / "0"))
    layout.add_image("busybox:1", [base], Config(cmd=["sh"], exposed_ports=["80/tcp"]))
    layout.add_image("pause:1", [base], Config(entrypoint=["/bin/sleep", "2147483647"]))
    here = layout.add_image("", [base], Config(cmd=["sh"]))
    marker = write_layer([file("wrong-platform", "arm64\n")], layout.scratch() / "1")
    other = layout.add_image("", [base, marker], Config(cmd=["sh"]), architecture="arm64")
    platforms = [
        (other, {"os": "linux", "architecture": "arm64", "variant": "v8"}),
        (here, {"os": "linux", "architecture": "amd64"}),
    ]
    layout.add_index("multi:1", platforms)


def _dynamic(packages: Packages, layout: Layout) -> None:
    base = [*base_directories(), *accounts(), *packages.entries(*LIBC)]
    shell = [*packages.entries(*SHELL), symlink("usr/bin/sh", "bash")]
    docker = [
        write_layer(base, layout.scratch() / "0", docker=True),
        write_layer(shell, layout.scratch() / "1", docker=True),
    ]
    layout.add_image("dynamic:1", docker, Config(cmd=["/bin/bash"], env=["PATH=/usr/bin:/bin"]), docker=True)


def nginx_state() -> list[Entry]:
    """The directories that its package makes when it is installed."""
    names = ("body", "fastcgi", "proxy", "scgi", "uwsgi")
    return [directory(f"var/lib/nginx/{name}", 0o700, uid=33) for name in names]


def nginx_site(port: int) -> list[Entry]:
    configuration = NGINX_CONF.replace("PORT", str(port))
    return [file("etc/nginx/nginx.conf", configuration), file("usr/share/nginx/html/index.html", PAGE)]


def _nginx(packages: Packages, layout: Layout) -> None:
    base = [*base_directories(), *accounts(), *packages.entries(*LIBC)]
    server = [*packages.entries(*NGINX), *nginx_state()]
    configuration = [
        *nginx_site(80),
        whiteout("usr/share/doc"),
        opaque("etc/nginx/sites-enabled"),
    ]
    scratch = layout.scratch()
    stack = [
        write_layer(base, scratch / "0", GZIP),
        write_layer(server, scratch / "1", ZSTD),
        write_layer(configuration, scratch / "2", NONE),
    ]
    run = Config(entrypoint=["/usr/sbin/nginx"], stop_signal="SIGQUIT", exposed_ports=["80/tcp"])
    layout.add_image("nginx:1", stack, run)


def odd_entries() -> tuple[list[Entry], list[Entry]]:
    """Two layers that hold one of everything; the upper hides parts of the lower."""
    long = "d" * 120
    lower = [
        directory("etc"),
        file("etc/hidden", "gone\n"),
        directory("opaque"),
        file("opaque/below", "gone\n"),
        directory("set"),
        file("set/uid", "#!/bin/sh\n", 0o4755),
        file("set/gid", "#!/bin/sh\n", 0o2755, gid=50),
        directory("set/sticky", 0o1777),
        directory("links"),
        file("links/one", "shared\n"),
        hardlink("links/two", "links/one"),
        symlink("links/absolute", "/links/one"),
        symlink("links/up", "../../../../../../links/one"),
        directory(f"long/{long}"),
        file(f"long/{long}/{'f' * 200}", "long\n"),
        Entry("nodes/fifo", tarfile.FIFOTYPE, 0o600),
        Entry("nodes/null", tarfile.CHRTYPE, 0o666, device=(1, 3)),
        Entry("xattr", data=b"x\n", xattrs={"user.note": b"kept"}),
        Entry("times", data=b"t\n", mtime=1_000_000_000),
        Entry("owner", data=b"o\n", uid=1000, gid=50),
        file("umläut-☃", "utf-8\n"),
        file("zeros", bytes(1 << 20)),
    ]
    upper = [
        whiteout("etc/hidden"),
        directory("opaque"),
        opaque("opaque"),
        file("opaque/above", "here\n"),
        file("links/one", "replaced\n"),
    ]
    return lower, upper


def _layers(packages: Packages, layout: Layout) -> None:
    scratch = layout.scratch()
    lower, upper = odd_entries()
    stack = [
        write_layer(busybox_entries(packages, scratch), scratch / "0", ZSTD),
        write_layer(lower, scratch / "1", GZIP),
        write_layer(upper, scratch / "2", NONE),
    ]
    layout.add_image("layers:1", stack, Config(cmd=["sh"]))


RECIPES: dict[str, Callable[[Packages, Layout], None]] = {
    "busybox": _busybox,
    "dynamic": _dynamic,
    "nginx": _nginx,
    "layers": _layers,
}
NAMES = ("busybox:1", "pause:1", "multi:1", "dynamic:1", "nginx:1", "layers:1")


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One builder at a time; the others find the result."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def layouts(recipes: Sequence[str] = tuple(RECIPES), cache: Path = CACHE) -> list[Path]:
    """The layouts of these recipes, built now or earlier."""
    return [layout(name, RECIPES[name], cache=cache) for name in recipes]


def layout(
    name: str, recipe: Callable[[Packages, Layout], None], others: Sequence[str] = (), cache: Path = CACHE
) -> Path:
    """The layout that `recipe` makes, from packages of `others` too, built now or earlier."""
    with _locked(cache):
        packages = Packages(cache, others)
        target = cache / "images" / f"{name}-{packages.key}"
        if not target.is_dir():
            work = target.with_name(f"{target.name}.{os.getpid()}")
            made = Layout(work)
            recipe(packages, made)
            made.finish()
            os.rename(work, target)
        return target
