"""The command line: flags, listings, log files, the words and the exit codes that callers read."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from conformance.harness.box import Box
from conformance.harness.cases import Group

case = Group("cli").case


def log_lines(box: Box, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in box.path(name).read_text().splitlines()]


@case()
def a_log_file_gets_the_failure_as_text(box: Box) -> None:
    log = box.path("log")
    box.flags = ("--log", str(log))
    box.call("state", "unknown").failed("container does not exist")
    [line] = log.read_text().splitlines()
    assert re.match(r'time="[^"]+Z" level=error msg=".*container does not exist', line), line


@case()
def a_log_file_gets_the_failure_as_json(box: Box) -> None:
    box.flags = ("--log", str(box.path("log")), "--log-format", "json")
    box.call("state", "unknown").failed(code=1)
    [line] = log_lines(box, "log")
    assert line["level"] == "error" and "container does not exist" in line["msg"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", line["time"]), line


@case()
def the_log_is_appended_to(box: Box) -> None:
    box.path("log").write_text('{"msg": "before"}\n')
    box.flags = ("--log", str(box.path("log")), "--log-format", "json")
    box.call("state", "unknown").failed()
    box.call("state", "unknown").failed()
    assert [line["msg"][:6] for line in log_lines(box, "log")][0] == "before"
    assert len(log_lines(box, "log")) == 3


@case()
def the_last_line_of_the_log_says_why_create_failed(box: Box) -> None:
    box.flags = ("--log", str(box.path("log")), "--log-format", "json")
    box.bundle("no-such-command").create().failed()
    last = log_lines(box, "log")[-1]
    assert last["level"] == "error", last
    assert 'exec: "no-such-command": executable file not found in $PATH' in last["msg"], last


@case()
def the_failure_is_on_stderr_even_with_a_log_file(box: Box) -> None:
    box.flags = ("--log", str(box.path("log")))
    box.call("state", "unknown").failed("container does not exist")


@case()
def a_success_logs_no_error(box: Box) -> None:
    box.flags = ("--log", str(box.path("log")), "--log-format", "json")
    assert box.bundle("echo", "ran").run().ok() == "ran\n"
    assert not box.path("log").exists() or not [line for line in log_lines(box, "log") if line["level"] == "error"]


@case()
def a_log_that_cannot_be_opened_fails(box: Box) -> None:
    box.flags = ("--log", str(box.path("no") / "log"))
    box.call("list").failed("no such file or directory")


@case()
def a_log_format_that_is_none(box: Box) -> None:
    box.flags = ("--log-format", "yaml")
    box.call("list").failed("log-format", code=1)


@case()
def debug_lines_do_not_change_the_result(box: Box) -> None:
    box.flags = ("--debug", "--log", str(box.path("log")), "--log-format", "json")
    one = box.sh("echo hello; exit 5")
    said = one.run()
    assert (said.code, said.text) == (5, "hello\n")
    if box.path("log").exists():
        assert all({"level", "msg", "time"} <= line.keys() for line in log_lines(box, "log"))


@case()
def flags_with_an_equals_sign(box: Box) -> None:
    one = box.bundle("echo", "ran")
    one.write()
    words = [box.runtime, f"--root={box.root}", "run", f"--bundle={one.path}", one.id]
    assert box.execute(words).ok() == "ran\n"


@case()
def flags_with_one_dash(box: Box) -> None:
    one = box.bundle()
    one.write()
    box.execute([box.runtime, "-root", str(box.root), "create", "-b", str(one.path), one.id]).ok()
    box.call("kill", "-a", one.id, "KILL").ok()
    one.becomes("stopped")
    box.call("delete", "-f", one.id).ok()


@case()
def an_unknown_flag(box: Box) -> None:
    box.call("create", "--nonsense", "x").failed("flag provided but not defined: -nonsense", code=1)


@case()
def an_unknown_global_flag(box: Box) -> None:
    box.flags = ("--nonsense",)
    box.call("list").failed("flag provided but not defined: -nonsense", code=1)


@case()
def an_unknown_command(box: Box) -> None:
    box.call("nonsense").failed("No help topic for 'nonsense'", code=3)


@case()
def missing_arguments(box: Box) -> None:
    for command in ("start", "state", "delete", "pause", "resume"):
        box.call(command).failed("requires exactly 1 argument", code=1)
    for command in ("kill", "exec", "ps"):
        box.call(command).failed("requires a minimum of 1 argument", code=1)


@case()
def version_names_the_program_and_the_specification(box: Box) -> None:
    lines = box.call("--version").lines()
    assert re.fullmatch(r"\S+ version \d+\.\d+\S*", lines[0]), lines
    assert any(re.fullmatch(r"spec: 1\.\d+\.\d+(-dev)?", line) for line in lines), lines


@case()
def help_names_every_command(box: Box) -> None:
    said = box.call("--help").ok()
    for command in ("create", "start", "run", "exec", "state", "kill", "delete", "list", "ps", "pause", "resume"):
        assert re.search(rf"^\s+{command}\b", said, re.MULTILINE), command
    for command in ("update", "events", "spec", "features", "checkpoint", "restore"):
        assert re.search(rf"^\s+{command}\b", said, re.MULTILINE), command


@case()
def help_of_a_command(box: Box) -> None:
    said = box.call("create", "--help").ok()
    for flag in ("--bundle", "--console-socket", "--pid-file", "--no-pivot", "--no-new-keyring", "--preserve-fds"):
        assert flag in said, flag


@case()
def list_as_a_table(box: Box) -> None:
    one, two = box.bundle().up(), box.bundle("true").up().becomes("stopped")
    head, *rows = box.call("list").lines()
    assert head.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert [row.split()[:4] for row in rows] == [
        [one.id, str(one.pid()), "running", str(one.path)],
        [two.id, "0", "stopped", str(two.path)],
    ]
    assert rows[0].split()[5] == "root"


@case()
def list_as_json(box: Box) -> None:
    one = box.bundle()
    one.create().ok()
    [entry] = box.call("list", "--format", "json").json()
    state = one.state()
    for key in ("ociVersion", "id", "pid", "status", "bundle", "rootfs", "created"):
        assert entry[key] == state[key], key
    assert entry["owner"] == "root"


@case()
def list_quiet(box: Box) -> None:
    names = [box.bundle().up().id, box.bundle().up().id]
    assert box.call("list", "-q").lines() == names


@case()
def list_of_nothing(box: Box) -> None:
    assert [line.split()[0] for line in box.call("list").lines()] == ["ID"]
    assert box.call("list", "-q").ok() == ""
    assert not box.call("list", "-f", "json").json()


@case()
def list_with_a_format_that_is_none(box: Box) -> None:
    box.call("list", "--format", "yaml").failed("invalid format option", code=1)


@case()
def ps_as_json_and_table(box: Box) -> None:
    one = box.bundle().up()
    assert box.call("ps", "--format", "json", one.id).json() == [one.pid()]
    head, row = box.call("ps", one.id).lines()
    assert "PID" in head.split() and str(one.pid()) in row.split() and "sleep 1000" in row


@case()
def ps_with_options_of_ps(box: Box) -> None:
    one = box.bundle().up()
    head, row = box.call("ps", one.id, "-o", "pid,comm").lines()
    assert head.split() == ["PID", "COMMAND"] and row.split() == [str(one.pid()), "sleep"]


@case()
def ps_of_an_unknown_container(box: Box) -> None:
    box.call("ps", "unknown").failed("container does not exist")


@case()
def spec_writes_a_config(box: Box) -> None:
    where = box.make_directory("spec")
    box.call("spec", cwd=where).ok()
    config = json.loads((where / "config.json").read_text())
    assert config["process"]["args"] == ["sh"] and config["root"] == {"path": "rootfs", "readonly": True}
    assert {entry["type"] for entry in config["linux"]["namespaces"]} >= {"pid", "network", "ipc", "uts", "mount"}
    assert "/proc/kcore" in config["linux"]["maskedPaths"] and "/proc/sys" in config["linux"]["readonlyPaths"]


@case()
def spec_does_not_overwrite(box: Box) -> None:
    where = box.make_directory("spec", **{"config.json": "mine"})
    box.call("spec", cwd=where).failed("exists. Remove it first", code=1)
    assert (where / "config.json").read_text() == "mine"


@case()
def spec_into_a_bundle(box: Box) -> None:
    where = box.make_directory("spec")
    box.call("spec", "--bundle", str(where)).ok()
    assert (where / "config.json").exists()


@case()
def a_config_of_spec_runs(box: Box) -> None:
    one = box.bundle()
    box.call("spec", "--bundle", str(one.path)).ok()
    config = json.loads((one.path / "config.json").read_text())
    config["process"].update(args=["sh", "-c", "id -u; hostname"], terminal=False)
    config["linux"]["cgroupsPath"] = one.cgroup
    (one.path / "config.json").write_text(json.dumps(config))
    uid, hostname = box.call("run", "--bundle", str(one.path), one.id).lines()
    assert uid == "0" and hostname == config["hostname"]


@case()
def spec_for_rootless_maps_the_caller(box: Box) -> None:
    where = box.make_directory("spec")
    box.call("spec", "--rootless", "--bundle", str(where)).ok()
    linux = json.loads((where / "config.json").read_text())["linux"]
    kinds = {entry["type"] for entry in linux["namespaces"]}
    assert "user" in kinds and "network" not in kinds
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]


@case()
def features_says_what_it_can_do(box: Box) -> None:
    found = box.call("features").json()
    assert found["ociVersionMin"] == "1.0.0" and found["ociVersionMax"].startswith("1.")
    hooks = {"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}
    assert hooks <= set(found["hooks"])
    linux = found["linux"]
    assert {"cgroup", "ipc", "mount", "network", "pid", "user", "uts"} <= set(linux["namespaces"])
    assert {"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"} <= set(linux["capabilities"])
    assert {"bind", "rbind", "ro", "rslave", "nosuid", "tmpcopyup"} <= set(found["mountOptions"])


@case()
def features_of_cgroups_and_seccomp(box: Box) -> None:
    linux = box.call("features").json()["linux"]
    assert linux["cgroup"]["v1"] and linux["cgroup"]["v2"]
    seccomp = linux["seccomp"]
    assert seccomp["enabled"]
    assert {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_NOTIFY"} <= set(seccomp["actions"])
    assert {"SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"} <= set(seccomp["operators"])
    assert {"SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"} <= set(seccomp["archs"])
    assert isinstance(linux["apparmor"]["enabled"], bool) and isinstance(linux["selinux"]["enabled"], bool)


@case()
def rootless_is_a_flag_of_three_values(box: Box) -> None:
    for value in ("true", "false", "auto"):
        box.flags = ("--rootless", value)
        assert box.call("list").ok().startswith("ID")


@case()
def the_output_of_the_container_is_all_there_is_on_stdout(box: Box) -> None:
    said = box.sh("echo out; echo err >&2").run()
    assert (said.text, said.error) == ("out\n", "err\n")


@case()
def stdin_of_the_container(box: Box) -> None:
    assert box.bundle("cat").run(input="one\ntwo\n").ok() == "one\ntwo\n"


@case()
def stdin_that_ends(box: Box) -> None:
    assert box.bundle("wc", "-c").run(input="").ok().strip() == "0"
