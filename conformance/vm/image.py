"""The machine's kernel, initrd and root disk, made from Debian packages and kept.

    <cache>/vm/<key>/vmlinuz  initrd  root.ext4      made under another name and renamed: whole, or not there
    <cache>/vm/packages/                             what debootstrap downloaded, for the next key

The key is the hash of what goes in: this file, with its list of Debian packages, guest/, the Python packages' versions.
<cache> is $OCID_CACHE, or /var/cache/ocid for root, or .cache in the clone: outside of a clone where possible, since
CI's clones are fresh each time. Refuses to build without root (debootstrap makes devices and changes root) and to leave
anything of a failed build. The build has a mount and a pid namespace of its own: when it is killed, its mounts and
processes end with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from conformance.images.debian import RETRIES
from conformance.vm.initrd import write_initrd

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).parent / "guest"
SUITE = "bookworm"
KERNEL = "linux-image-cloud-amd64"
# What the tests run on and are compared with; python3-minimal's few modules are not enough for pytest.
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "kmod", "procps", "iproute2", "nftables", "util-linux", "libseccomp2"),
    *("apparmor", "busybox-static", "criu", "docker-registry", "e2fsprogs", "iptables", "python3", "runc", "crun"),
    # An ordinary user with a systemd of his own, and podman as he has it; debootstrap does not find out by itself who
    # provides podman's network.
    *("uidmap", "libpam-systemd", "dbus-user-session", "podman", "netavark"),
)
# For building and booting. Not in hack/setup: they are large, and only this lane needs them.
HOST_TOOLS = {
    "debootstrap": "debootstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "cpio": "cpio",
}
# With what ocid itself needs; its own code is on the clone's disk.
PYTHON_PACKAGES = ("pytest", "hypothesis", "ocid")
_IN_IMAGE = ("initrd-init", "ocid-tests.service")  # of guest/
KEPT = 4  # images: clones of several branches may share a cache
_DISK_MIB = 2048  # sparse


def cache_directory() -> Path:
    """Where images are kept."""
    chosen = os.environ.get("OCID_CACHE")
    if chosen:
        return Path(chosen) / "vm"
    system = Path("/var/cache/ocid")
    try:
        system.mkdir(mode=0o755, exist_ok=True)
        if os.access(system, os.W_OK):
            return system / "vm"
    except OSError:
        pass
    return ROOT / ".cache/vm"


def key() -> str:
    """The name of the image that this clone needs."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    here = Path(__file__).parent
    files = [here / name for name in ("image.py", "initrd.py")] + [GUEST / name for name in _IN_IMAGE]
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    for name in sorted(_closure(PYTHON_PACKAGES)):
        digest.update(f"{name}=={distribution(name).version}\n".encode())
    return digest.hexdigest()[:16]


def image(say: Callable[[str], None], *, rebuild: bool = False) -> Path:
    """The directory with the image, made first where it is missing. Raises SystemExit with what went wrong."""
    install_tools(say)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    wanted = cache / key()
    if wanted.exists() and not rebuild:
        os.utime(wanted)
        return wanted  # while somebody makes another one
    with _locked(cache / "lock"):
        if rebuild and wanted.exists():
            shutil.rmtree(wanted)
        if not wanted.exists():
            if os.geteuid() != 0:
                raise SystemExit("hack/vm: making the image needs root")
            began = time.monotonic()
            say(f"making the image {wanted}: minutes, once")
            log = cache / "build.log"
            command = [sys.executable, "-m", "conformance.vm.image", str(wanted)]
            with log.open("wb") as output:
                # kill-child: when we die, so does the build, with all that it mounted.
                done = subprocess.run(
                    ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *command],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    check=False,
                )
            if done.returncode:
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:])
                raise SystemExit(f"{tail}hack/vm: making the image failed; all of it is in {log}")
            say(f"image ready ({time.monotonic() - began:.0f} s)")
        os.utime(wanted)
        _forget_old(cache)
    return wanted


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_old(cache: Path) -> None:
    images = [path for path in cache.iterdir() if re.fullmatch(r"[0-9a-f]{16}(\.part)?", path.name)]
    images.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in images[KEPT:]:
        shutil.rmtree(path)


def install_tools(say: Callable[[str], None]) -> None:
    """The Debian packages that building and booting need, where they are missing."""
    # debootstrap and depmod are in sbin, which an ordinary user's PATH may lack.
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [package for tool, package in HOST_TOOLS.items() if shutil.which(tool, path=path) is None]
    if not missing:
        return
    if os.geteuid() != 0:
        raise SystemExit(f"hack/vm: these Debian packages are missing, and installing them needs root: {missing}")
    say(f"Debian packages: {' '.join(missing)}")
    _apt("install", "-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", *missing)


def _apt(*arguments: str, directory: Path | None = None) -> None:
    """apt-get, and once more with fresh lists when that fails. Raises SystemExit."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    asked = ["apt-get", *RETRIES, *arguments]
    for command in (asked, ["apt-get", *RETRIES, "update", "-qq"], asked):
        done = subprocess.run(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if done.returncode == 0 and command is asked:
            return
    raise SystemExit(f"hack/vm: {' '.join(command)}:\n{done.stderr.decode(errors='replace')}")


# ------------------------------------------------------------------------------------------------------- the build


def build(target: Path) -> None:
    """Makes `target`; the caller is alone with its mounts and processes."""
    part = target.with_name(f"{target.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        # Without this a mount that debootstrap makes could show outside.
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        root = part / "root"
        _bootstrap(root, target.parent / "packages")
        version = _kernel(part, root)
        write_initrd(part / "initrd", root, version, GUEST / "initrd-init")
        _python(root)
        _configure(root)
        write_ext4(part / "root.ext4", root, _DISK_MIB)
        shutil.rmtree(root)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_ext4(target: Path, source: Path, mib: int) -> None:
    """A disk with what is in `source`, made without mounting it."""
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(source), str(target), f"{mib}m"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _bootstrap(root: Path, packages: Path) -> None:
    packages.mkdir(exist_ok=True)
    print("debootstrap", flush=True)
    subprocess.run(
        [
            *("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", f"--cache-dir={packages}"),
            *("--merged-usr", SUITE, str(root)),
        ],
        check=True,
    )


def _kernel(part: Path, root: Path) -> str:
    """Kernel and modules, out of the package without running its scripts (they would make an initrd that we do not
    want). Returns the kernel's version."""
    described = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True).stdout
    found = re.search(r"Depends: (linux-image-[0-9][\w.+-]*)", described)
    if found is None:
        _apt("update", "-qq")
        described = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=True).stdout
        found = re.search(r"Depends: (linux-image-[0-9][\w.+-]*)", described)
    if found is None:
        raise SystemExit(f"apt knows no {KERNEL}: is this Debian?")
    print(f"kernel {found[1]}", flush=True)
    download = part / "download"
    download.mkdir()
    download.chmod(0o777)  # apt fetches as a user of its own
    _apt("download", found[1], directory=download)
    (package,) = download.glob("*.deb")
    kernel = part / "kernel"
    subprocess.run(["dpkg-deb", "-x", str(package), str(kernel)], check=True)
    (vmlinuz,) = (kernel / "boot").glob("vmlinuz-*")
    version = vmlinuz.name.removeprefix("vmlinuz-")
    shutil.copyfile(vmlinuz, part / "vmlinuz")
    modules = root / "usr/lib/modules"
    modules.mkdir(parents=True, exist_ok=True)
    (kernel / "lib/modules" / version).rename(modules / version)
    subprocess.run(["depmod", "-b", str(root / "usr"), version], check=True)
    shutil.rmtree(kernel)
    shutil.rmtree(download)
    return version


def _python(root: Path) -> None:
    """The packages as this clone's lock has them: their files were checked against their hashes when they came into
    .venv."""
    site = root / "opt/venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    for name in sorted(_closure(PYTHON_PACKAGES) - {"ocid"}):
        found = distribution(name)
        for file in found.files or ():
            if not str(file).startswith(".."):
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file.locate(), site / file)
    (site / "ocid.pth").write_text("/ocid\n")
    programs = root / "opt/venv/bin"
    programs.mkdir()
    (programs / "python").symlink_to("/usr/bin/python3")
    (programs / "ocid").write_text(
        "#!/opt/venv/bin/python\nimport sys\nfrom cri.cli.main import main\nsys.exit(main())\n"
    )
    (programs / "ocid").chmod(0o755)
    (root / "opt/venv/pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")


def _closure(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another Python or another system
        found.add(name)
        pending += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requirements if "extra ==" not in text]
    return found


def _configure(root: Path) -> None:
    (root / "ocid").mkdir()
    (root / "etc/hostname").write_text("ocid-vm\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw,noatime 0 0\n")
    units = root / "etc/systemd/system"
    shutil.copy(GUEST / "ocid-tests.service", units)
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "ocid-tests.service").symlink_to("../ocid-tests.service")
    # Seconds each under emulation, and of no use here.
    for unit in (
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "docker-registry.service",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "e2scrub_reap.service",
        "fstrim.timer",
        "podman-auto-update.service",
        "podman-auto-update.timer",
        "podman-restart.service",
        "podman.service",
        "podman.socket",
        "systemd-update-utmp.service",
        "systemd-update-utmp-runlevel.service",
        "systemd-pcrphase.service",
        "systemd-random-seed.service",
        "getty.target",
    ):
        (units / unit).symlink_to("/dev/null")
    journal = root / "etc/systemd/journald.conf.d"
    journal.mkdir(parents=True, exist_ok=True)
    (journal / "volatile.conf").write_text("[Journal]\nStorage=volatile\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
