"""`--systemd-cgroup` of an ordinary user: his own systemd makes the scope, within what it was given itself.

The user is one whose systemd runs without a session (loginctl enable-linger), as those who run services do.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import pytest

from runtime.linux.process import set_child_subreaper
from tests.bundles import OCID_RUNTIME, Bundle, Result
from tests.integration.test_runtime_rootless import give
from tests.support import SOON_S, eventually
from tests.vm.units import CGROUPS, Units, cgroup_of, systemctl, value

MIB = 1 << 20
ours = pytest.mark.skipif(bool(OCID_RUNTIME), reason="of ocirun's own: runc and crun do otherwise")


class User:
    """An account, its systemd, and what is run as it."""

    def __init__(self, name: str) -> None:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True, timeout=SOON_S)
        account = pwd.getpwnam(name)
        self.name, self.uid, self.gid, self.home = name, account.pw_uid, account.pw_gid, account.pw_dir
        self.runtime = f"/run/user/{self.uid}"
        self.cgroup = CGROUPS / f"user.slice/user-{self.uid}.slice/user@{self.uid}.service"
        self.who: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": []}

    def env(self, **changes: str) -> dict[str, str]:
        known = {"PATH": os.environ["PATH"], "HOME": self.home, "USER": self.name, "XDG_RUNTIME_DIR": self.runtime}
        return {**known, **changes}

    def begin(self) -> None:
        subprocess.run(["loginctl", "enable-linger", self.name], check=True, timeout=SOON_S)
        eventually(lambda: Path(self.runtime, "bus").exists(), what="the user's bus")
        eventually(lambda: self.systemctl("is-active", "default.target") == "active\n", what="the user's systemd")

    def end(self) -> None:
        subprocess.run(["loginctl", "disable-linger", self.name], check=True, timeout=SOON_S)
        systemctl("stop", f"user@{self.uid}.service", f"user-{self.uid}.slice")
        subprocess.run(["userdel", "--remove", self.name], check=True, timeout=SOON_S, capture_output=True)

    def run(self, *words: str, check: bool = True, **env: str) -> Result:
        # Through files: a container that lives on keeps the pipes that this would wait for.
        with TemporaryFile() as out, TemporaryFile() as err:
            code = subprocess.run(
                words,
                **self.who,
                env=self.env(**env),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=4 * SOON_S,
                check=False,
            ).returncode
            for file in (out, err):
                file.seek(0)
            done = Result(code, out.read().decode(), err.read().decode())
        assert code == 0 or not check, (words, done)
        return done

    def systemctl(self, *words: str) -> str:
        return self.run("systemctl", "--user", *words, check=False).text

    def shown(self, unit: str, *names: str) -> dict[str, str]:
        text = self.systemctl("show", unit, *(f"--property={name}" for name in names))
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def known_units(self, pattern: str) -> list[str]:
        text = self.systemctl("list-units", "--all", "--plain", "--no-legend", pattern)
        return [line.split()[0] for line in text.splitlines() if line.strip()]


class UserUnits(Units):
    """Everything is done by the user and with his systemd."""

    def __init__(self, directory: Path, user: User) -> None:
        super().__init__(directory)
        self.user = user
        give(self.directory, user.uid, user.gid)
        self.root.mkdir()
        give(self.root, user.uid, user.gid)

    def make(self, *args: str) -> Bundle:
        made = super().make(*args)
        made.linux["namespaces"].append({"type": "user"})
        made.linux["uidMappings"] = [{"containerID": 0, "hostID": self.user.uid, "size": 1}]
        made.linux["gidMappings"] = [{"containerID": 0, "hostID": self.user.gid, "size": 1}]
        # What every config.json has that was not written for ordinary users.
        made.linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
        give(made.path, self.user.uid, self.user.gid)
        return made

    def popen(self, *words: str, env: Mapping[str, str] | None = None, **changes: Any) -> subprocess.Popen[bytes]:
        return super().popen(*words, env=self.user.env(**(env or {})), **{**self.user.who, **changes})

    def cgroups(self, name: str = "") -> list[str]:
        top = self.user.cgroup / self.cgroup
        found = [path for path in top.iterdir() if path.is_dir()] if top.is_dir() else []
        return [str(path) for path in found if not name or path.name == f"test-{name}.scope"]

    def _delete(self, name: str) -> None:
        self.ocirun("delete", "--force", name).ok()

    def close(self) -> None:
        super().close()
        assert self.user.known_units("test-*.scope") == []
        self.user.systemctl("stop", self.cgroup)


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    made = User("lingerer")
    try:
        made.begin()
        yield made
    finally:
        made.end()


@pytest.fixture
def his(user: User) -> Iterator[UserUnits]:
    with opened(user) as found:
        yield found


@contextmanager
def opened(user: User) -> Iterator[UserUnits]:
    # Not below pytest's own directory: every session that starts closes that to all but root.
    with TemporaryDirectory(prefix="ocirun-user-") as directory:
        Path(directory).chmod(0o711)
        set_child_subreaper(True)
        found = UserUnits(Path(directory), user)
        try:
            yield found
        finally:
            try:
                found.close()
            finally:
                set_child_subreaper(False)


def test_the_scope_is_his_systemds_with_its_limits(his: UserUnits) -> None:
    bundle = his.make()
    bundle.linux["resources"] |= {"memory": {"limit": 64 * MIB}, "pids": {"limit": 77}}
    bundle.up()
    unit = his.unit(bundle)
    assert cgroup_of(bundle) == his.user.cgroup / his.cgroup / unit
    assert (value(bundle, "memory.max"), value(bundle, "pids.max")) == (str(64 * MIB), "77")
    told = his.user.shown(unit, "ActiveState", "Slice", "Delegate", "MemoryMax", "TasksMax")
    assert told == {
        "ActiveState": "active",
        "Slice": his.cgroup,
        "Delegate": "yes",
        "MemoryMax": str(64 * MIB),
        "TasksMax": "77",
    }
    his.ocirun("update", "--memory", "96m", "--pids-limit", "99", bundle.id).ok()
    assert (value(bundle, "memory.max"), value(bundle, "pids.max")) == (str(96 * MIB), "99")
    his.user.systemctl("daemon-reload")
    assert (value(bundle, "memory.max"), value(bundle, "pids.max")) == (str(96 * MIB), "99")
    told = his.user.shown(unit, "MemoryMax", "TasksMax")
    assert told == {"MemoryMax": str(96 * MIB), "TasksMax": "99"}
    bundle.delete().ok()
    bundle.gone()
    assert his.user.known_units(unit) == []


def test_without_a_path_it_is_in_his_user_slice(his: UserUnits) -> None:
    bundle = his.make()
    del bundle.linux["cgroupsPath"]
    bundle.up()
    unit = f"{OCID_RUNTIME or 'ocirun'}-{bundle.id}.scope"
    assert cgroup_of(bundle) == his.user.cgroup / "user.slice" / unit
    bundle.delete().ok()
    assert his.user.known_units(unit) == [] and not (his.user.cgroup / "user.slice" / unit).exists()


def test_run_leaves_no_unit(his: UserUnits) -> None:
    bundle = his.sh("cat /proc/self/cgroup; exit 3")
    result = bundle.run()
    assert result.code == 3 and "0::/" in result.text
    bundle.gone()
    assert his.user.known_units(his.unit(bundle)) == []


def test_a_container_lives_as_any_other(his: UserUnits) -> None:
    bundle = his.make().up()
    his.ocirun("pause", bundle.id).ok()
    assert value(bundle, "cgroup.freeze") == "1" and bundle.status() == "paused"
    his.ocirun("resume", bundle.id).ok()
    figures = json.loads(his.ocirun("events", "--stats", bundle.id).ok())
    assert figures["data"]["pids"]["current"] == 1
    his.ocirun("kill", bundle.id, "KILL").ok()
    bundle.becomes("stopped")
    bundle.delete(force=False).ok()
    bundle.gone()
    assert his.user.known_units(his.unit(bundle)) == []


@ours  # runc leaves it where it was: a limit of the container's does not hold for it
def test_an_exec_from_outside_of_his_systemd_is_moved_into_the_scope(his: UserUnits) -> None:
    bundle = his.make().up()
    assert f"user@{his.user.uid}" not in Path("/proc/self/cgroup").read_text()
    bundle.exec("sleep", "1000", flags=("--detach",)).ok()
    assert len(value(bundle, "cgroup.procs").split()) == 2
    assert len(json.loads(his.ocirun("ps", "--format", "json", bundle.id).ok())) == 2
    assert bundle.exec("cat", "/proc/self/cgroup").ok() == "0::/\n"
    bundle.exec("false").failed("", 1)


def test_an_exec_from_inside_of_his_systemd_is_in_the_scope(his: UserUnits) -> None:
    bundle = his.make().up()
    inside = ["systemd-run", "--user", "--quiet", "--scope", "--slice=user.slice"]
    said = his.user.run(*inside, *his.command("exec", bundle.id, "cat", "/proc/self/cgroup")).text
    assert said == "0::/\n"
    his.user.run(*inside, *his.command("exec", "--detach", bundle.id, "sleep", "1000"))
    assert len(value(bundle, "cgroup.procs").split()) == 2


def test_root_of_a_namespace_of_his_is_still_he(his: UserUnits) -> None:
    """As rootless podman calls a runtime."""
    bundle = his.make()
    bundle.linux["uidMappings"][0]["hostID"] = bundle.linux["gidMappings"][0]["hostID"] = 0
    bundle.write()
    enter = ["unshare", "--user", "--map-root-user"]
    his.user.run(*enter, *his.command("run", "--detach", "--bundle", str(bundle.path), bundle.id))
    assert cgroup_of(bundle) == his.user.cgroup / his.cgroup / his.unit(bundle)
    his.user.run(*enter, *his.command("update", "--pids-limit", "33", bundle.id))
    assert value(bundle, "pids.max") == "33"
    his.user.run(*enter, *his.command("delete", "--force", bundle.id))
    bundle.gone()
    assert his.user.known_units(his.unit(bundle)) == []


# ------------------------------------------------------------------------------------------------ ends, and failures


@ours
@pytest.mark.parametrize("point", ["create.noted", "cgroup.made", "create.ready"])
def test_a_create_that_is_killed_is_deleted_by_force(his: UserUnits, point: str) -> None:
    bundle = his.make()
    bundle.write()
    killed = his.popen("create", "--bundle", str(bundle.path), bundle.id, env={"OCID_FAILPOINTS": f"{point}=kill"})
    assert killed.wait(SOON_S) == -9
    his.ocirun("delete", "--force", bundle.id).ok()
    bundle.gone()
    assert his.user.known_units(his.unit(bundle)) == []
    bundle.up()


@ours
def test_what_his_systemd_was_not_given_is_refused(his: UserUnits) -> None:
    bundle = his.make()
    bundle.linux["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": 4 * MIB}]
    bundle.create().failed("linux.resources.hugepageLimits")
    bundle.gone()
    assert his.user.known_units(his.unit(bundle)) == []


@ours
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"XDG_RUNTIME_DIR": ""}, "neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set"),
        ({"DBUS_SESSION_BUS_ADDRESS": "tcp:host=localhost,port=1"}, "names no unix socket"),
        ({"XDG_RUNTIME_DIR": "/tmp/not/there"}, "connect to the user's bus at /tmp/not/there/bus: ENOENT"),
        ({"DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/dbus/system_bus_socket"}, "start unit"),
    ],
)
def test_a_bus_that_is_not_there_or_not_his_is_named(his: UserUnits, env: dict[str, str], words: str) -> None:
    bundle = his.make()
    bundle.create(env=env).failed(words)
    assert not (his.root / bundle.id).exists()


@ours
def test_an_address_of_the_bus_wins_and_without_a_bus_systemd_is_asked_itself(his: UserUnits) -> None:
    bundle = his.make()
    address = f"unix:path={his.user.runtime}/%62us,guid=0"
    bundle.run("--detach", env={"DBUS_SESSION_BUS_ADDRESS": address, "XDG_RUNTIME_DIR": ""}).ok()
    bundle.delete().ok()
    bus = Path(his.user.runtime, "bus")
    bus.rename(bus.with_name("hidden"))
    try:
        bundle.up()
        assert cgroup_of(bundle) == his.user.cgroup / his.cgroup / his.unit(bundle)
        bundle.delete().ok()
        bundle.gone()
    finally:
        bus.with_name("hidden").rename(bus)
    assert his.user.known_units(his.unit(bundle)) == []


# ------------------------------------------------------------------------------------------------------------ podman


class Podman:
    """Rootless podman with this runtime, on a root file system instead of an image."""

    def __init__(self, his: UserUnits) -> None:
        self.user = his.user
        self.runtime = his.command()[0]
        self.rootfs = str(his.make().path / "rootfs")

    def __call__(self, *words: str, check: bool = True) -> Result:
        return self.user.run("podman", "--runtime", self.runtime, *words, check=check)


@pytest.fixture
def podman(his: UserUnits) -> Iterator[Podman]:
    found = Podman(his)
    try:
        yield found
    finally:
        found("rm", "--all", "--force", "--time", "0")
        pause = Path(found.user.runtime, "libpod/tmp/pause.pid")
        if pause.exists():
            subprocess.run(["kill", pause.read_text().strip()], check=False)


def test_rootless_podman(podman: Podman) -> None:
    told = podman("info", "--format", "{{.Host.CgroupManager}} {{.Host.CgroupsVersion}} {{.Host.OCIRuntime.Path}}").ok()
    assert told.split() == ["systemd", "v2", podman.runtime]
    run = ("run", "--detach", "--name", "one", "--network", "none", "--memory", "64m", "--pids-limit", "55")
    container = podman(*run, "--rootfs", podman.rootfs, "sleep", "1000").ok().strip()
    pid = podman("inspect", "--format", "{{.State.Pid}}", "one").ok().strip()
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    scope = podman.user.cgroup / f"user.slice/libpod-{container}.scope"
    # podman's own cgroup for an exec may lie below it.
    assert (CGROUPS / line.removeprefix("0::/")).is_relative_to(scope)
    assert (scope / "memory.max").read_text().strip() == str(64 * MIB)
    assert (scope / "pids.max").read_text().strip() == "55"
    assert podman("exec", "one", "cat", "/proc/1/cmdline").ok() == "sleep\x001000\x00"
    podman("pause", "one").ok()
    assert (scope / "cgroup.freeze").read_text() == "1\n"
    podman("unpause", "one").ok()
    podman("stop", "--time", "1", "one").ok()
    assert podman("inspect", "--format", "{{.State.ExitCode}}", "one").ok() == "137\n"
    podman("rm", "one").ok()
    assert podman.user.known_units(f"libpod-{container}.scope") == [] and not scope.exists()
    assert (
        podman("run", "--rm", "--network", "none", "--rootfs", podman.rootfs, "sh", "-c", "exit 5", check=False).code
        == 5
    )
