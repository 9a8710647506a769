"""The images that critest of cri-tools asks for, under the paths of its names; the registry's own name is for whoever
serves them to say (a mirror in hosts.toml).

What its specs need of them, and why each is not simply one of `recipes`:

    busybox       Debian's ordinary build: busybox-static runs applets without looking for them in $PATH, and a masked
                  /bin/ls would be there all the same. `ipcs` is util-linux's, `pgrep` a few lines of shell
    nginx         on 80, and on 12003 for the host's network, with busybox beside it
    httpd         busybox, which says "httpd" in its log as it begins
    nonewprivs    prints "Effective uid: N"; a set-uid mawk that reads it in /proc
    pause         catatonit, static, which reaps: no `sleep` that a spec would find in the pod
    test-image-*  one image under three tags, three under one each, and what USER may say
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conformance.images.debian import base_directories
from conformance.images.layer import Entry, Layer, directory, file, hardlink, symlink, write_layer
from conformance.images.layout import Config, Layout
from conformance.images.recipes import (
    LIBC,
    NGINX,
    PAGE,
    Packages,
    accounts,
    applets,
    layout,
    nginx_site,
    nginx_state,
)

PACKAGES = ("busybox", "catatonit", "mawk", "util-linux")
DEFAULT = "e2e-test-images/busybox:1.29-2"
PAUSE = "pause:3.9"
# The same for a runtime that keeps one for itself; other than that which specs pull and count the tags of.
SANDBOX = "sandbox:1"
STAGING = "k8s-staging-cri-tools"
# images/build of cri-tools has these: the uids, the group without a name, and the user in a group of the image.
USERS = {"uid": "1002", "username": "www-data", "uid-group": "1003:1004", "username-group": "www-data:1004"}
ONE_PASSWD = "root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home/default-user:/bin/sh\n"
ONE_GROUP = "root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"
HOST_PORT = 12003
LIBRARIES = ("libc.so.6", "libm.so.6", "libresolv.so.2", "ld-linux-x86-64.so.2")
# Documentation and character sets, half of what would be unpacked.
UNREAD = ("usr/share", "usr/lib/x86_64-linux-gnu/gconv")
EFFECTIVE_UID = '/^Uid:/ { print "Effective uid: " $3 }'
PGREP = """\
#!/bin/sh
# The pids of the processes of this name.
found=1
for status in /proc/[0-9]*/comm; do
    read -r name <"$status" 2>/dev/null || continue
    [ "$name" = "$1" ] || continue
    pid=${status#/proc/}
    echo "${pid%/comm}"
    found=0
done
exit $found
"""


def critest() -> Path:
    """The layout with all of them, built now or earlier."""
    return layout("critest", _critest, PACKAGES)


def _one(packages: Packages, package: str, path: str) -> Entry:
    return next(entry for entry in packages.entries(package) if entry.path == path)


def _libraries(packages: Packages) -> Iterator[Entry]:
    """What a program of Debian's needs to start, of libc6's 12 MiB."""
    yield from (directory(path) for path in ("usr/lib", "usr/lib/x86_64-linux-gnu", "usr/lib64"))
    yield from (entry for entry in packages.entries("libc6") if entry.path.rpartition("/")[2] in LIBRARIES)


def _tools(packages: Packages, work: Path, where: str) -> list[Entry]:
    """busybox under each of its names in the directory `where`, the first one the file and the others links to it."""
    binary = _one(packages, "busybox", "usr/bin/busybox").data
    first, *others = [f"{where}/{name}" for name in ("[", "busybox", *sorted(set(applets(binary, work)) - {"["}))]
    return [
        file(first, binary, 0o755),
        *(hardlink(path, first, 0o755) for path in others),
        replace(_one(packages, "util-linux", "usr/bin/ipcs"), path=f"{where}/ipcs"),
        file(f"{where}/pgrep", PGREP, 0o755),
    ]


def _busybox(packages: Packages, work: Path) -> list[Entry]:
    plain = ("bin", "dev", "home", "proc", "run", "sys", "usr", "usr/bin", "var")
    return [
        *(directory(path) for path in plain),
        directory("root", 0o700),
        directory("tmp", 0o1777),
        symlink("lib", "usr/lib"),
        symlink("lib64", "usr/lib64"),
        symlink("var/run", "/run"),
        *_libraries(packages),
        *_tools(packages, work, "bin"),
        *accounts(),
    ]


class _Images:
    """Adds images that share layers: each layer is written once."""

    def __init__(self, made: Layout) -> None:
        self.made = made
        self._count = 0

    def layer(self, entries: list[Entry]) -> Layer:
        self._count += 1
        written = write_layer(entries, self.made.scratch() / str(self._count))
        return self.made.keep(written)

    def add(self, name: str, layers: list[Layer], config: Config) -> None:
        self.made.add_image(name, layers, config)


def _critest(packages: Packages, made: Layout) -> None:
    images = _Images(made)
    busybox = images.layer(_busybox(packages, made.scratch()))
    shell = Config(cmd=["sh"])
    images.add(DEFAULT, [busybox], shell)
    pause = images.layer([replace(_one(packages, "catatonit", "usr/bin/catatonit"), path="pause")])
    images.add(PAUSE, [pause], Config(entrypoint=["/pause", "-P"]))
    images.add(SANDBOX, [pause], Config(entrypoint=["/pause", "-P"], labels={"for": "pod sandboxes"}))
    _servers(packages, images, busybox)
    mawk = replace(_one(packages, "mawk", "usr/bin/mawk"), path="bin/effective-uid", mode=0o4755)
    tell = Config(entrypoint=["/bin/effective-uid", EFFECTIVE_UID, "/proc/self/status"])
    images.add("e2e-test-images/nonewprivs:1.3", [busybox, images.layer([mawk])], tell)
    for names in (["1:latest"], ["2:latest"], ["3:latest"], ["latest:latest"], ["digest:latest"],
                  ["tag:test"], ["tag:all"], ["tags:1", "tags:2", "tags:3"]):  # fmt: skip
        marked = [busybox, images.layer([file(names[0].replace(":", "-"), "")])]
        for name in names:
            images.add(f"{STAGING}/test-image-{name}", marked, shell)
    for name, user in USERS.items():
        images.add(f"{STAGING}/test-image-user-{name}:latest", [busybox], replace(shell, user=user))
    groups = images.layer([directory("etc"), file("etc/passwd", ONE_PASSWD), file("etc/group", ONE_GROUP)])
    images.add(f"{STAGING}/test-image-predefined-group:latest", [busybox, groups], replace(shell, user="1000"))


def _servers(packages: Packages, images: _Images, busybox: Layer) -> None:
    nginx = images.layer(
        [
            *base_directories(),
            *accounts(),
            *(entry for entry in packages.entries(*LIBC, *NGINX) if not entry.path.startswith(UNREAD)),
            *nginx_state(),
            *_tools(packages, images.made.scratch(), "usr/bin"),
            *(directory(path) for path in ("usr/share", "usr/share/nginx", "usr/share/nginx/html")),
        ]
    )
    run = Config(entrypoint=["/usr/sbin/nginx"], stop_signal="SIGQUIT", exposed_ports=["80/tcp"])
    images.add("e2e-test-images/nginx:1.14-2", [nginx, images.layer(nginx_site(80))], run)
    on_host = replace(run, exposed_ports=[f"{HOST_PORT}/tcp"])
    images.add(f"{STAGING}/hostnet-nginx-amd64:latest", [nginx, images.layer(nginx_site(HOST_PORT))], on_host)
    page = images.layer([directory("www"), file("www/index.html", PAGE)])
    serve = ["sh", "-c", "echo httpd on port 80; exec httpd -f -v -p 80 -h /www"]
    images.add("e2e-test-images/httpd:2.4.39-4", [busybox, page], Config(cmd=serve, exposed_ports=["80/tcp"]))
