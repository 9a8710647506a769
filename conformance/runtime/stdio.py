"""Terminals, console sockets, and the descriptors a container's process has."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import termios
from pathlib import Path

from conformance.harness import kernel
from conformance.harness.box import Box, listen, receive_terminal
from conformance.harness.bundle import Bundle
from conformance.harness.cases import Group

case = Group("stdio").case


def read_until(master: int, wanted: str, seconds: float = 15.0) -> str:
    """What comes out of a terminal until it holds `wanted`."""
    text = ""
    while wanted not in text:
        assert select.select([master], [], [], seconds)[0], f"nothing more from the terminal after {text!r}"
        try:
            data = os.read(master, 4096)
        except OSError as error:
            assert error.errno == errno.EIO, error
            data = b""
        assert data, f"the terminal ended with {text!r}"
        text += data.decode()
    return text


def on_terminal(box: Box, one: Bundle) -> int:
    """Creates and starts a container with a console socket; the terminal's master."""
    one.process["terminal"] = True
    with listen(box.path("console")) as listener:
        one.create("--console-socket", str(box.path("console"))).ok()
        master = receive_terminal(listener)
    one.start().ok()
    return master


@case()
def a_terminal_over_the_console_socket(box: Box) -> None:
    master = on_terminal(box, box.sh("tty; echo done; read line; echo got $line; sleep 1000"))
    assert "/dev/pts/0" in read_until(master, "done")
    os.write(master, b"hello\n")
    read_until(master, "got hello")
    os.close(master)


@case()
def a_terminal_is_the_controlling_one(box: Box) -> None:
    master = on_terminal(box, box.sh("trap 'echo interrupted' INT; echo ready; while :; do sleep 0.05; done"))
    read_until(master, "ready")
    os.write(master, b"\x03")
    read_until(master, "interrupted")
    os.close(master)


@case()
def a_terminal_has_the_size_of_the_config(box: Box) -> None:
    one = box.sh("stty size; sleep 1000")
    one.process["consoleSize"] = {"height": 11, "width": 77}
    master = on_terminal(box, one)
    read_until(master, "11 77")
    os.close(master)


@case()
def a_terminal_can_be_resized(box: Box) -> None:
    master = on_terminal(box, box.sh("trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"))
    read_until(master, "ready")
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 34, 0, 0))
    read_until(master, "12 34")
    os.close(master)


@case()
def a_terminal_belongs_to_the_user(box: Box) -> None:
    one = box.sh("stat -c 'owner %u' $(tty); sleep 1000")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    master = on_terminal(box, one)
    read_until(master, "owner 1000")
    os.close(master)


@case()
def dev_console_is_the_terminal(box: Box) -> None:
    master = on_terminal(box, box.sh("test -c /dev/console && echo through the console > /dev/console; sleep 1000"))
    read_until(master, "through the console")
    os.close(master)


@case()
def there_is_no_dev_console_without_a_terminal(box: Box) -> None:
    assert box.sh("ls -d /dev/console /dev/null; true").run().ok() == "/dev/null\n"


@case()
def a_terminal_without_a_console_socket_is_refused_when_detached(box: Box) -> None:
    one = box.bundle()
    one.process["terminal"] = True
    one.create().failed("console socket")
    one.run("--detach").failed("console socket")


@case()
def a_console_socket_without_a_terminal_is_refused(box: Box) -> None:
    one = box.bundle()
    with listen(box.path("console")):
        one.create("--console-socket", str(box.path("console"))).failed("console socket")


@case()
def a_console_socket_that_nobody_listens_on(box: Box) -> None:
    one = box.bundle()
    one.process["terminal"] = True
    one.create("--console-socket", str(box.path("nobody"))).failed("no such file or directory")


@case()
def run_on_the_caller_s_terminal(box: Box) -> None:
    one = box.sh("tty; read line; echo got $line; exit 6")
    one.process["terminal"] = True
    master, slave = os.openpty()
    child = one.running(stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    read_until(master, "/dev/pts/0")
    os.write(master, b"hello\n")
    read_until(master, "got hello")
    assert child.wait(20) == 6
    os.close(master)


@case()
def the_caller_s_terminal_is_left_as_it_was(box: Box) -> None:
    one = box.sh("tty > /tmp/ran")
    one.process["terminal"] = True
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    one.running(stdin=slave, stdout=slave, stderr=slave, start_new_session=True).wait(20)
    assert one.written("tmp/ran") == "/dev/pts/0\n"
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


# ------------------------------------------------------------------------------------------------------- descriptors


def descriptors(one: Bundle) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{one.pid()}/fd"))


@case()
def nothing_but_stdio_is_open(box: Box) -> None:
    one = box.bundle().up()
    kernel.eventually(lambda: kernel.proc(one.pid(), "comm") == "sleep\n", "execve")
    assert descriptors(one) == [0, 1, 2]


@case()
def a_descriptor_of_the_caller_stays_out(box: Box) -> None:
    one = box.bundle()
    with open("/etc/hostname" if Path("/etc/hostname").exists() else "/etc/passwd") as file:
        one.create(pass_fds=(file.fileno(),)).ok()
    one.start().ok()
    kernel.eventually(lambda: kernel.proc(one.pid(), "comm") == "sleep\n", "execve")
    assert descriptors(one) == [0, 1, 2]


@case()
def preserve_fds(box: Box) -> None:
    one = box.sh("cat <&3; cat <&4")
    one.write()
    files = [box.path(name) for name in ("a", "b")]
    for file in files:
        file.write_text(f"{file.name}\n")
    first, second = (os.open(file, os.O_RDONLY) for file in files)

    def place() -> None:
        high = [os.dup(first), os.dup(second)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    said = one.run("--preserve-fds", "2", preexec_fn=place, close_fds=False)
    os.close(first)
    os.close(second)
    assert said.ok() == "own-a\nown-b\n"


@case()
def listen_fds(box: Box) -> None:
    one = box.sh("echo $LISTEN_FDS $LISTEN_PID; cat <&3")
    file = box.path("given")
    file.write_text("given\n")
    opened = os.open(file, os.O_RDONLY)

    def place() -> None:
        if opened != 3:
            os.dup2(opened, 3)
        os.set_inheritable(3, True)
        os.environ["LISTEN_PID"] = str(os.getpid())

    words = ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh"]
    one.write()
    command = box.command("run", "--bundle", str(one.path), one.id)
    said = box.execute([*words, *command], preexec_fn=place, close_fds=False)
    os.close(opened)
    assert said.ok() == "1 1\ngiven\n"


@case()
def notify_socket(box: Box) -> None:
    """The container says on its own socket that it is ready; the service manager of the caller hears it from start."""
    one = box.sh("echo $NOTIFY_SOCKET > /tmp/where; sleep 1000")
    path = box.path("notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        environment = {**os.environ, "NOTIFY_SOCKET": str(path)}
        one.create(env=environment).ok()
        start = box.popen("start", one.id, env=environment)
        inside = f"/proc/{one.pid()}/root{one.written('tmp/where').strip()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as container:
            container.sendto(b"READY=1\n", inside)
        heard = ""

        def start_ended() -> bool:
            nonlocal heard
            while select.select([manager], [], [], 0)[0]:
                data, given, _, _ = socket.recv_fds(manager, 4096, 4)
                heard += data.decode() + "\n"
                # A barrier: who sent it waits until we have closed what came along (sd_notify_barrier(3)).
                for descriptor in given:
                    os.close(descriptor)
            return start.poll() is not None

        kernel.eventually(start_ended, "start to end")
    assert start.returncode == 0
    assert "READY=1\n" in heard and f"MAINPID={one.pid()}\n" in heard


@case()
def stdio_is_the_caller_s(box: Box) -> None:
    one = box.bundle()
    target = box.path("out")
    with open(target, "w") as out:
        one.create(stdout=out).ok()
    one.start().ok()
    assert os.readlink(f"/proc/{one.pid()}/fd/1") == str(target)


@case()
def another_user_may_open_its_stdio_again(box: Box) -> None:
    one = box.sh("echo again > /dev/stderr")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    one.capabilities()
    reader, writer = os.pipe()
    said = one.run(stderr=writer)
    os.close(writer)
    text = os.read(reader, 1000)
    os.close(reader)
    assert (said.code, text) == (0, b"again\n")


@case()
def the_host_s_dev_null_keeps_its_owner(box: Box) -> None:
    one = box.sh("id -u > /tmp/ran")
    one.process["user"] = {"uid": 1000, "gid": 1000}
    (one.rootfs / "tmp").chmod(0o1777)
    before = os.stat("/dev/null")
    with open("/dev/null", "r+") as null:
        one.run(stdin=null, stdout=null, stderr=null).ok()
    assert one.written("tmp/ran") == "1000\n"
    found = os.stat("/dev/null")
    assert (found.st_uid, found.st_gid, found.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


@case()
def much_output_arrives_whole(box: Box) -> None:
    said = box.sh("head -c 3000000 /dev/zero | tr '\\0' x").run()
    assert said.code == 0 and len(said.text) == 3_000_000


@case()
def a_closed_stdin(box: Box) -> None:
    one = box.sh("cat; echo end")
    assert one.run(preexec_fn=lambda: os.dup2(os.open("/dev/null", os.O_RDONLY), 0)).ok() == "end\n"
