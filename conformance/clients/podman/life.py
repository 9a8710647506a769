"""From run to rm: commands, exit codes, streams, terminals, signals, pauses, restarts, attach, logs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

from conformance.clients.podman.tool import Podman
from conformance.clients.steps import criu_fails, eventually, expect, holds, same
from conformance.clients.terminal import DETACH, DETACH_KEY, INTERRUPT


def run(it: Podman) -> None:
    same("stdout", it.run("IMAGE", "echo", "hello"), "hello")
    same("stdin to stdout", it.run("-i", "IMAGE", "tr", "a-z", "A-Z", stdin="loud"), "LOUD")
    it.shell("exit 7", code=7)
    it.shell("sh -c 'kill -TERM $$'; exit $?", code=143)
    result = it.result("run", "--rm", "--net", "none", it.image, "sh", "-c", "echo out; echo err >&2")
    same("the two streams", (result.stdout, result.stderr), ("out\n", "err\n"))


def run_what_is_not_there(it: Podman) -> None:
    said = it.run("IMAGE", "no-such-command", code=127)
    holds("the error", said, "no-such-command", "executable file not found in $PATH")
    said = it.run("IMAGE", "/no/such/file", code=127)
    holds("the error", said, "/no/such/file", "no such file or directory")
    holds("the error", it.run("IMAGE", "/etc", code=126), "permission denied")
    same("containers afterwards", it("ps", "-aq"), "")


def run_detached(it: Podman) -> None:
    full = it.start("web")
    same("ps", it("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}"), f"{full} web")
    pid = it.pid("web")
    same("its command line", Path(f"/proc/{pid}/cmdline").read_bytes(), b"sleep\x003600\x00")
    expect(os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid"), "it shares our pid namespace")
    it("stop", "--time", "0", "web")
    same("state after stop", it.state("web"), "exited")
    expect(not Path(f"/proc/{pid}").exists(), f"pid {pid} lives on after stop")
    it("rm", "web")
    it("container", "exists", "web", code=1)


def run_interactive(it: Podman) -> None:
    with it.terminal("run", "--rm", "-it", "--net", "none", "IMAGE", "sh", lines=33, columns=99) as terminal:
        terminal.type("until [ \"$(stty size)\" = '33 99' ]; do :; done; tty; echo si'zed'\n")
        holds("the terminal inside", terminal.until("sized"), "/dev/pts/0")
        terminal.resize(44, 111)
        # A size comes by SIGWINCH and through three processes: it is asked for until it is there.
        terminal.type("until [ \"$(stty size)\" = '44 111' ]; do :; done; echo resi'zed'\n")
        terminal.until("resized")
        terminal.type("trap 'echo inter\\rupted; exit 5' INT; echo wai'ting'; while :; do sleep 0.1; done\n")
        terminal.until("waiting")
        terminal.type(INTERRUPT)
        terminal.until("interrupted")
        same("exit code", terminal.end(), 5)


def create_then_start(it: Podman) -> None:
    it("create", "--net", "none", "--name", "later", it.image, "sh", "-c", "echo started; exit 3")
    same("state", it.state("later"), "created")
    it("init", "later")
    same("state after init", it.state("later"), "initialized")
    holds("the process that waits", Path(f"/proc/{it.pid('later')}/status").read_text(), "Name:")
    holds("start --attach", it("start", "--attach", "later", code=3), "started")
    same("exit code by inspect", it.inspect("later")["State"]["ExitCode"], 3)


def exec_into_it(it: Podman) -> None:
    it.start("web", "--env", "COLOR=red")
    same("user, color, directory", it("exec", "web", "sh", "-c", "id -u; echo $COLOR; pwd").split(), ["0", "red", "/"])
    same("as a user", it("exec", "-u", "operator", "-w", "/tmp", "web", "sh", "-c", "id -un; pwd"), "operator\n/tmp")
    same("with a variable", it("exec", "-e", "COLOR=blue", "web", "sh", "-c", "echo $COLOR"), "blue")
    same("stdin", it("exec", "-i", "web", "cat", stdin="through"), "through")
    it("exec", "web", "sh", "-c", "exit 9", code=9)
    holds("a missing command", it("exec", "web", "no-such-command", code=127), "executable file not found in $PATH")
    holds("a directory", it("exec", "web", "/etc", code=126), "permission denied")
    capabilities = it("exec", "--privileged", "web", "grep", "CapEff", "/proc/self/status")
    expect(capabilities != it("exec", "web", "grep", "CapEff", "/proc/self/status"), "--privileged changes nothing")


def exec_detached(it: Podman) -> None:
    it.start("web")
    it("exec", "--detach", "web", "sh", "-c", "echo was here > /tmp/mark; exec sleep 1234")
    eventually(lambda: "sleep 1234" in it("top", "web", "args"), "the detached command runs")
    same("what it wrote", it("exec", "web", "cat", "/tmp/mark"), "was here")
    it("stop", "-t", "0", "web")


def exec_interactive(it: Podman) -> None:
    it.start("web")
    with it.terminal("exec", "-it", "web", "sh", lines=22, columns=77) as terminal:
        terminal.until("# ")
        terminal.type("stty size; test -t 0 && echo ter'minal'\n")
        holds("the size", terminal.until("terminal"), "22 77")
        terminal.until("# ")
        terminal.type("exit 6\n")
        same("exit code", terminal.end(), 6)
    same("the container afterwards", it.state("web"), "running")


def stop_and_kill(it: Podman) -> None:
    it.start("polite", "IMAGE", "sh", "-c", "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.1; done")
    eventually(lambda: "ready" in it("logs", "polite"), "its trap is set")
    it("stop", "--time", "10", "polite")
    same("exit code after SIGTERM", it.inspect("polite")["State"]["ExitCode"], 4)
    holds("its last words", it("logs", "polite"), "bye")
    it.start("stubborn")  # pid 1 without a handler: only SIGKILL ends it
    began = time.monotonic()
    it("stop", "--time", "1", "stubborn")
    expect(1 <= time.monotonic() - began < 10, f"stop --time 1 takes {time.monotonic() - began:.1f} s")
    same("exit code after SIGKILL", it.inspect("stubborn")["State"]["ExitCode"], 137)
    it("start", "stubborn")
    it("kill", "--signal", "KILL", "stubborn")
    same("wait after kill", it("wait", "stubborn"), "137")
    it("kill", "stubborn", code=125)


def kill_with_any_signal(it: Podman) -> None:
    script = "trap 'echo got usr1' USR1; trap 'exit 12' HUP; echo ready; while :; do sleep 0.1; done"
    it.start("ears", "IMAGE", "sh", "-c", script)
    eventually(lambda: "ready" in it("logs", "ears"), "its traps are set")
    it("kill", "-s", "USR1", "ears")
    eventually(lambda: "got usr1" in it("logs", "ears"), "SIGUSR1 arrives")
    it("kill", "-s", str(int(signal.SIGHUP)), "ears")
    same("wait", it("wait", "ears"), "12")


def pause_and_unpause(it: Podman) -> None:
    it.start("clock", "IMAGE", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; done")
    count = Path(f"/proc/{it.pid('clock')}/root/dev/shm/count")
    eventually(count.exists, "the clock ticks")
    it("pause", "clock")
    same("state", it.state("clock"), "paused")
    seen = [count.read_text()]
    for _ in range(20):
        seen.append(count.read_text())
    same("what a paused container counts", len(set(seen)), 1)
    it("exec", "clock", "true", code=255)
    it("unpause", "clock")
    same("state", it.state("clock"), "running")
    eventually(lambda: count.read_text() != seen[0], "it counts on")


def kill_while_paused(it: Podman) -> None:
    it.start("frozen")
    it("pause", "frozen")
    it("rm", "--force", "--time", "0", "frozen")
    it("container", "exists", "frozen", code=1)


def restart(it: Podman) -> None:
    it.start("web")
    first = it.pid("web")
    it("restart", "--time", "0", "web")
    same("state", it.state("web"), "running")
    expect(it.pid("web") != first and not Path(f"/proc/{first}").exists(), f"pid {first} is still there")
    it("exec", "web", "touch", "/kept")
    it("restart", "--time", "0", "web")
    it("exec", "web", "test", "-e", "/kept")


def restart_policy(it: Podman) -> None:
    it.start("again", "--restart", "on-failure:2", "IMAGE", "sh", "-c", "echo try; exit 1")
    eventually(lambda: it("logs", "again").count("try") == 3, "three tries")
    eventually(lambda: it.state("again") == "exited", "it is given up")
    same("restarts", it.inspect("again")["RestartCount"], 2)


def attach(it: Podman) -> None:
    it.start("cat", "-i", "IMAGE", "cat")
    with it.terminal("attach", "--sig-proxy=false", "cat") as terminal:
        terminal.type("over\n")
        terminal.until("over")
        terminal.until("over")  # the terminal's echo, then the container's
    same("logs", it("logs", "cat"), "over")
    it.start("tty", "-it", "IMAGE", "sh")
    with it.terminal("attach", "--detach-keys", DETACH_KEY, "tty") as terminal:
        terminal.type("echo at'tached'\n")
        terminal.until("attached")
        terminal.type(DETACH)
        same("exit code of a detached attach", terminal.end(), 0)
    same("state afterwards", it.state("tty"), "running")


def logs(it: Podman) -> None:
    it.start("talk", "IMAGE", "sh", "-c", "for i in 1 2 3; do echo out $i; echo err $i >&2; done; echo end")
    it("wait", "talk")
    result = it.result("logs", "talk")
    same("stdout", result.stdout, "out 1\nout 2\nout 3\nend\n")
    same("stderr", result.stderr, "err 1\nerr 2\nerr 3\n")
    many = it.run("IMAGE", "seq", "20000")
    same("20,000 lines", many.splitlines()[-1], "20000")


def top_and_stats(it: Podman) -> None:
    it.start("busy", "IMAGE", "sh", "-c", "sleep 3600 & while :; do :; done")
    eventually(lambda: len(it("top", "busy", "pid").split()) == 3, "both processes are listed")
    holds("top", it("top", "busy", "pid", "hpid", "user"), str(it.pid("busy")), "root")
    holds("top by the container's ps", it("top", "busy", "-o", "pid,args"), "sleep 3600")
    stats = json.loads(it("stats", "--no-stream", "--format", "json", "busy"))[0]
    same("stats: processes", stats["pids"], "2")
    expect(float(stats["cpu_percent"].rstrip("%")) > 10, f"a busy loop takes {stats['cpu_percent']} of a CPU")
    used = float(re.match(r"[0-9.]+", stats["mem_usage"])[0])  # type: ignore[index]
    expect(used > 0, f"stats: memory in use is {stats['mem_usage']}")


def init_process(it: Podman) -> None:
    holds("pid 1 with --init", it.shell("cat /proc/1/comm", "--init"), "podman-init")
    # An orphan that ends is waited for by the init, not left a zombie.
    it.start("reaped", "--init", "IMAGE", "sh", "-c", "(sleep 0.1 & ) ; exec sleep 3600")
    eventually(lambda: it("top", "reaped", "state").count("Z") == 0, "no zombie is left")


def inspect_pids_and_files(it: Podman) -> None:
    pidfile, cidfile = it.directory / "web.pid", it.directory / "web.cid"
    full = it.start("web", "--pidfile", pidfile, "--cidfile", cidfile)
    same("--pidfile", int(pidfile.read_text()), it.pid("web"))
    same("--cidfile", cidfile.read_text(), full)
    same("ociRuntime by inspect", it.inspect("web")["OCIRuntime"], it.runtime)


def timeout(it: Podman) -> None:
    began = time.monotonic()
    it.run("--timeout", "1", "IMAGE", "sleep", "3600", code=255)
    expect(time.monotonic() - began < 10, "--timeout 1 takes over 10 s")


def healthcheck(it: Podman) -> None:
    it.start("sick", "--health-cmd", "test -e /tmp/well", "--health-interval", "disable", "--health-retries", "1")
    it("healthcheck", "run", "sick", code=1)
    it("exec", "sick", "touch", "/tmp/well")
    it("healthcheck", "run", "sick")
    same("status", it.inspect("sick")["State"]["Health"]["Status"], "healthy")


def hooks(it: Podman) -> None:
    folder = it.folder("hooks.d")
    seen = it.directory / "hooks.seen"
    script = it.file("hook", f'#!/bin/sh\necho "$1 $(cat)" >> {seen}\n', 0o755)
    for stage in ("prestart", "createRuntime", "poststart", "poststop"):
        document = {
            "version": "1.0.0",
            "hook": {"path": str(script), "args": ["hook", stage]},
            "when": {"always": True},
            "stages": [stage],
        }
        (folder / f"{stage}.json").write_text(json.dumps(document))
    it("--hooks-dir", folder, "run", "--rm", "--net", "none", it.image, "true")
    lines = seen.read_text().splitlines()
    same("stages", [line.split()[0] for line in lines], ["prestart", "createRuntime", "poststart", "poststop"])
    statuses = [json.loads(line.partition(" ")[2])["status"] for line in lines]
    same("status at each", statuses[-1], "stopped")


def checkpoint(it: Podman) -> str | None:
    """To the store and back, and to a file and out of it under another name. Without a criu that knows this kernel it
    can be shown that the container survives the attempt."""
    it.start("counts", "IMAGE", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; sleep 0.1; done")
    count = ("exec", "counts", "cat", "/dev/shm/n")
    eventually(lambda: it("exec", "counts", "ls", "/dev/shm") == "n", "it counts")
    if missing := criu_fails():
        pid = it.pid("counts")
        it("container", "checkpoint", "counts", code=125)
        expect(_counts_on(it, count), "it does not count on after a checkpoint that failed")
        same("its pid", it.pid("counts"), pid)
        return f"criu does not work here ({missing}); the container outlives a checkpoint that fails"
    before = int(it(*count))
    it("container", "checkpoint", "counts")
    same("state after checkpoint", it.state("counts"), "exited")
    it("container", "restore", "counts")
    expect(before <= int(it(*count)) < before + 100, "restored, it does not count on from where it was")
    expect(_counts_on(it, count), "restored, it stands still")
    file = it.directory / "checkpoint.tar"
    it("container", "checkpoint", "--export", file, "counts")
    it("rm", "counts")
    it("container", "restore", "--import", file, "--name", "elsewhere")
    expect(int(it("exec", "elsewhere", "cat", "/dev/shm/n")) > before, "out of a file it begins anew")
    return None


def _counts_on(it: Podman, count: tuple[str, ...]) -> bool:
    before = it(*count)
    eventually(lambda: it(*count) != before, "it counts on")
    return True


STEPS = (
    run,
    run_what_is_not_there,
    run_detached,
    run_interactive,
    create_then_start,
    exec_into_it,
    exec_detached,
    exec_interactive,
    stop_and_kill,
    kill_with_any_signal,
    pause_and_unpause,
    kill_while_paused,
    restart,
    restart_policy,
    attach,
    logs,
    top_and_stats,
    init_process,
    inspect_pids_and_files,
    timeout,
    healthcheck,
    hooks,
    checkpoint,
)
