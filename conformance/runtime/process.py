"""config.json's process: who it is, what it may, its arguments, environment, directory, limits and priorities."""

from __future__ import annotations

import os
import re

from conformance.harness import kernel
from conformance.harness.box import Box
from conformance.harness.cases import Group

case = Group("process").case


def is_running(pid: int) -> None:
    """Waits until the process of the container is the one that was asked for."""
    kernel.eventually(lambda: kernel.proc(pid, "comm") == "sleep\n", "execve")


# -------------------------------------------------------------------------------------------------- arguments, files


@case()
def arguments_arrive_as_they_are(box: Box) -> None:
    one = box.bundle("sh", "-c", 'for a; do echo "[$a]"; done', "sh", "a b", "", "*", "$HOME", "ü", "'")
    assert one.run().lines() == ["[a b]", "[]", "[*]", "[$HOME]", "[ü]", "[']"]


@case()
def no_arguments_are_refused(box: Box) -> None:
    one = box.bundle()
    one.process["args"] = []
    one.create().failed("args")


@case()
def the_command_is_searched_in_its_own_path(box: Box) -> None:
    one = box.bundle("mine")
    one.process["env"] = ["PATH=/bin:/opt/tools"]
    (one.rootfs / "opt/tools").mkdir(parents=True)
    (one.rootfs / "opt/tools/mine").write_text("#!/bin/sh\necho found\n")
    (one.rootfs / "opt/tools/mine").chmod(0o755)
    assert one.run().ok() == "found\n"


@case()
def a_command_with_a_slash_is_relative_to_cwd(box: Box) -> None:
    one = box.bundle("./program")
    one.process["cwd"] = "/tmp"
    (one.rootfs / "tmp/program").write_text("#!/bin/sh\npwd\n")
    (one.rootfs / "tmp/program").chmod(0o755)
    assert one.run().ok() == "/tmp\n"


@case()
def a_command_that_is_not_in_the_path(box: Box) -> None:
    box.bundle("nothing").run().failed('exec: "nothing": executable file not found in $PATH')


@case()
def a_command_by_path_that_is_missing(box: Box) -> None:
    box.bundle("/bin/nothing").run().failed("/bin/nothing", "no such file or directory")


@case()
def a_command_that_is_not_executable(box: Box) -> None:
    box.bundle("/etc/passwd").run().failed("/etc/passwd", "permission denied")


@case()
def a_command_that_is_a_directory(box: Box) -> None:
    box.bundle("/etc").run().failed("/etc")


@case()
def a_command_for_another_machine(box: Box) -> None:
    one = box.bundle("/program")
    (one.rootfs / "program").write_bytes(b"\x7fELF" + bytes(100))
    (one.rootfs / "program").chmod(0o755)
    one.run().failed("exec format error")


@case()
def environment_is_exactly_what_was_given(box: Box) -> None:
    one = box.bundle("env")
    one.process["env"] = ["PATH=/bin", "A=1", "B=two words", "EMPTY=", "HOME=/nowhere"]
    assert sorted(one.run().lines()) == ["A=1", "B=two words", "EMPTY=", "HOME=/nowhere", "PATH=/bin"]


@case()
def the_environment_of_the_caller_stays_out(box: Box) -> None:
    one = box.bundle("env")
    said = one.run(env={**os.environ, "SECRET": "x"}).ok()
    assert "SECRET" not in said and "PATH=/bin" in said


@case()
def home_is_that_of_the_user(box: Box) -> None:
    one = box.sh("echo $HOME")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    assert one.run().ok() == "/tmp\n"


@case()
def cwd(box: Box) -> None:
    one = box.bundle("pwd")
    one.process["cwd"] = "/etc"
    assert one.run().ok() == "/etc\n"


@case()
def a_cwd_that_is_missing_is_made(box: Box) -> None:
    one = box.bundle("pwd")
    one.process["cwd"] = "/a/new/place"
    assert one.run().ok() == "/a/new/place\n"
    assert (one.rootfs / "a/new/place").is_dir()


@case()
def a_cwd_that_is_relative_is_refused(box: Box) -> None:
    one = box.bundle("pwd")
    one.process["cwd"] = "etc"
    one.create().failed("cwd", "absolute")


@case()
def a_cwd_that_is_a_file(box: Box) -> None:
    one = box.bundle("pwd")
    one.process["cwd"] = "/etc/passwd"
    one.create().failed("not a directory")


@case()
def a_cwd_that_only_the_user_may_enter(box: Box) -> None:
    one = box.bundle("pwd")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.process["cwd"] = "/private"
    (one.rootfs / "private").mkdir()
    os.chown(one.rootfs / "private", 1000, 1000)
    (one.rootfs / "private").chmod(0o700)
    one.capabilities()
    assert one.run().ok() == "/private\n"


# -------------------------------------------------------------------------------------------------------- who it is


@case()
def uid_and_gid(box: Box) -> None:
    one = box.sh("id -u; id -g")
    one.process["user"] = {"uid": 1000, "gid": 2000}
    assert one.run().lines() == ["1000", "2000"]


@case()
def all_four_ids_are_the_user_s(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 2000}
    status = kernel.status(one.up().pid())
    assert set(status["Uid"].split()) == {"1000"} and set(status["Gid"].split()) == {"2000"}


@case()
def additional_groups(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [5, 1234, 70000]}
    assert kernel.status(one.up().pid())["Groups"].split() == ["5", "1234", "70000"]


@case()
def no_additional_groups_means_none(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.create(preexec_fn=lambda: os.setgroups([7, 8])).ok()
    assert kernel.status(one.pid())["Groups"].split() == []


@case()
def a_numeric_user_is_never_a_name(box: Box) -> None:
    one = box.bundle("id", "-u")
    (one.rootfs / "etc/passwd").write_text("1000:x:0:0::/:/bin/sh\n")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    assert one.run().ok() == "1000\n"


@case()
def umask(box: Box) -> None:
    one = box.sh("umask; touch /tmp/x; stat -c %a /tmp/x")
    one.process["user"]["umask"] = 0o027
    assert one.run().lines() == ["0027", "640"]


@case()
def the_default_umask(box: Box) -> None:
    one = box.bundle("sh", "-c", "umask")
    assert one.run(preexec_fn=lambda: os.umask(0o077)).ok() == "0022\n"


@case()
def a_uid_out_of_range_is_refused(box: Box) -> None:
    one = box.bundle()
    one.process["user"] = {"uid": 4294967296, "gid": 0}
    one.create().failed("4294967296")


# -------------------------------------------------------------------------------------------------------- what else


@case()
def signals_are_as_at_a_login(box: Box) -> None:
    pid = box.bundle().up().pid()
    is_running(pid)
    # 32 and 33 belong to the C library; whatever started this suite may have left them ignored.
    own = ~(3 << 31)
    assert [int(kernel.status(pid)[key], 16) & own for key in ("SigBlk", "SigIgn")] == [0, 0]


@case()
def it_is_its_own_session_and_group(box: Box) -> None:
    pid = box.bundle().up().pid()
    fields = kernel.proc(pid, "stat").rpartition(")")[2].split()
    # Field 5 and 6 of proc_pid_stat(5): the process group and the session.
    assert fields[2] == fields[3] != kernel.proc(os.getpid(), "stat").rpartition(")")[2].split()[3]


@case()
def a_session_keyring_of_its_own(box: Box) -> None:
    one = box.bundle("cat", "/proc/keys")
    said = one.run().ok()
    assert re.search(rf"keyring\s+_ses\.{one.id}\b", said), said


@case()
def no_new_keyring(box: Box) -> None:
    one = box.bundle("cat", "/proc/keys")
    said = one.run("--no-new-keyring").ok()
    assert f"_ses.{one.id}" not in said and "keyring" in said


@case("apparmor")
def an_apparmor_profile(box: Box) -> None:
    one = box.bundle("cat", "/proc/self/attr/current")
    one.process["apparmorProfile"] = "unconfined"
    assert one.run().ok().strip() == "unconfined"


@case()
def an_apparmor_profile_that_is_not_loaded(box: Box) -> None:
    one = box.bundle()
    one.process["apparmorProfile"] = "conformance-no-such-profile"
    one.create().failed("apparmor")
