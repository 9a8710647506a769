"""The init of a container, from clone to execve: one ordered table of steps, each with the reason for its place.

Runs in a copy of the caller's interpreter, inside the new namespaces, and is what the container sees of us. Refuses to
import anything once it has begun to change roots (a module of the image would run as root, threats P9), and to hold
more than the fds it needs. Invariant: a failing step reaches the caller with the step's name, object and errno; the
process then exits, and with it go its namespaces and every mount in them.
"""

from __future__ import annotations

import errno
import os
import sys

from runtime import ids, process, rootfs, sync
from runtime import labels as confinement
from runtime.errors import RuntimeFailure
from runtime.init_state import Init, Setup, Step
from runtime.linux.failpoint import failpoint
from runtime.linux.libc import KernelError
from runtime.linux.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    MNT_DETACH,
    MS_PRIVATE,
    MS_SHARED,
    MS_SLAVE,
    OPEN_TREE_CLONE,
    FsMount,
    mount_setattr,
    mountinfo,
    move_mount,
    open_tree,
    pivot_root,
    umount2,
)
from runtime.linux.namespace import loopback_up
from runtime.linux.process import (
    CLONE_NEWCGROUP,
    personality,
    set_dumpable,
    set_no_new_privs,
    setdomainname,
    sethostname,
    unshare,
)
from runtime.mounts import init_propagation
from runtime.namespaces import join
from runtime.procfs import write_proc
from runtime.rootfs_devices import bind_console
from runtime.terminal import make_controlling, open_pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from runtime.spec import Spec

_AT_FDCWD = -100


def session(init: Init) -> None:
    init.setup.end_by_signals()
    os.setsid()
    set_dumpable(init.setup.dumpable)


def be_root(init: Init) -> None:
    ids.be_root()
    set_dumpable(init.setup.dumpable)


def keyring(init: Init) -> None:
    # The session keyring is looked up through the user's, so it is made anew before anybody can ask for it.
    process.new_keyring(f"_ses.{init.setup.id}", init.warn)


def join_namespaces(init: Init) -> None:
    join(init.setup.joins)


def bring_up_loopback(init: Init) -> None:
    loopback_up()


def isolate_mounts(init: Init) -> None:
    kind, recursive = init_propagation(init.spec.rootfs_propagation)
    mount_setattr(_AT_FDCWD, "/", AT_RECURSIVE if recursive else 0, propagation=kind)


def make_root(init: Init) -> None:
    setup, path = init.setup, init.setup.root_path
    tree = setup.root_tree
    if tree < 0:
        tree = setup.make_root()
    kind, recursive = init_propagation(init.spec.rootfs_propagation)
    if kind == MS_SHARED or not recursive:
        _make_parent_private(path)
    try:
        target = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        if not init.spec.has("user"):
            raise
        # Root of a user namespace cannot pass every directory of the host's: on top of the old root is as good a
        # place to be pivoted from, and changes no look-up, since that starts below it.
        target = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        move_mount(tree, target)
    finally:
        os.close(target)
    init.root = rootfs.Root(
        tree,
        setup.bundle,
        setup.cgroups,
        user_namespace=setup.in_user_namespace,
        cgroupns=init.spec.has("cgroup"),
        label=init.spec.mount_label,
        warn=init.warn,
    )
    init.root.sources = setup.sources


def _make_parent_private(path: str) -> None:
    """What is moved onto a shared mount shows up on the host, and pivot_root(2) refuses one as parent."""
    parent = "/"
    path = os.readlink(f"/proc/self/fd/{(fd := os.open(path, os.O_PATH | os.O_CLOEXEC))}")
    os.close(fd)
    for point in mountinfo():
        inside = path == point.target or path.startswith(point.target.rstrip("/") + "/")
        if inside and len(point.target) >= len(parent):
            parent = point.target
    mount_setattr(_AT_FDCWD, parent, 0, propagation=MS_PRIVATE)


def private_proc(init: Init) -> None:
    try:
        init.proc_fd = FsMount("proc", "proc").make()
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
        # A user namespace without a PID namespace of its own may not mount one: the host's, not yet covered.
        init.proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def fill_root(init: Init) -> None:
    # umask(2) would take bits from the modes of devices and directories.
    os.umask(0)
    rootfs.apply(rootfs.plan_mounts(init.spec), init.in_root)
    if init.in_root.user_namespace and init.spec.masked_paths:
        init.in_root.hold_null()
    os.umask(0o022)


def console(init: Init) -> None:
    root = init.in_root
    master, init.slave = open_pair(root.fd, init.process.console_size)
    try:
        name = os.readlink(f"/proc/self/fd/{init.slave}")
        bind_console(root, open_tree(init.slave, "", OPEN_TREE_CLONE | AT_EMPTY_PATH))
        init.channel.send("Console", text=("/dev/pts/" + os.path.basename(name),), fds=(master,))
    finally:
        os.close(master)


def runtime_hooks(init: Init) -> None:
    # They run in the caller's namespaces, while this process's exist and its root is not entered yet (runtime-spec).
    init.channel.send("Hooks")
    init.channel.receive("Go")


def container_hooks(init: Init) -> None:
    # In the new mount namespace, where the host's files are still at their paths, and the root is where we stand.
    os.fchdir(init.in_root.fd)
    known = init.setup.state(os.getpid(), "creating")
    env = [os.fsencode(entry) for entry in init.process.env]
    from runtime import hooks  # the caller of the init has imported it

    hooks.run(init.spec.hooks.create_container, known, "createContainer hooks", env=env)


def pivot(init: Init) -> None:
    if init.setup.no_pivot:
        from runtime.rootfs_nopivot import move_root
    # From here on the image's files are within reach of the import system: it must not look.
    sys.path[:] = []
    sys.meta_path[:] = []
    root = init.in_root
    os.fchdir(root.fd)
    if init.setup.no_pivot:
        move_root(init.setup.root_path)
    else:
        # The old root is stacked on the new one and then taken away from under it, so that no directory inside the
        # image is needed. Slave first: the unmount must not travel to the host. By its own fd: "." is the new root
        # still, whose shared volumes must stay shared.
        old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            pivot_root(".", ".")
            mount_setattr(old, "", AT_EMPTY_PATH | AT_RECURSIVE, propagation=MS_SLAVE)
            umount2(".", MNT_DETACH)
        finally:
            os.close(old)
    os.chdir("/")
    wanted = init.spec.rootfs_propagation
    if wanted is not None:
        mount_setattr(_AT_FDCWD, "/", AT_RECURSIVE if wanted[1] else 0, propagation=wanted[0])


def names(init: Init) -> None:
    if init.spec.hostname:
        sethostname(init.spec.hostname)
    if init.spec.domainname:
        setdomainname(init.spec.domainname)


def sysctls(init: Init) -> None:
    for name, value in init.spec.sysctl:
        # sysctl(8): dots and slashes change places, so that eth0.100 can be named.
        path = "sys/" + (name if "/" in name.partition(".")[0] else name.translate(str.maketrans("./", "/.")))
        write_proc(init.proc_fd, path, value.encode("utf-8", "surrogateescape"), f"sysctl {name}={value}")


def protect(init: Init) -> None:
    rootfs.apply(rootfs.plan_protection(init.spec), init.in_root)


def limits(init: Init) -> None:
    process.set_cpus()
    process.set_rlimits(init.process.rlimits, init.warn)
    if init.process.io_priority is not None:
        process.set_io_priority(init.process.io_priority)
    if init.spec.personality is not None:
        personality(init.spec.personality)
    if init.setup.memory_policy is not None:
        init.setup.memory_policy()


def terminal(init: Init) -> None:
    if init.slave >= 0:
        for fd in (0, 1, 2):
            os.dup2(init.slave, fd)
        make_controlling(0)
    else:
        _place_stdio(init.setup.stdio)
    process.own_stdio(init.process.user)


def _place_stdio(stdio: tuple[int, int, int]) -> None:
    """Puts the three on 0, 1 and 2, which may be each other's numbers."""
    if stdio == (0, 1, 2):
        return
    copies = [os.dup(fd) for fd in stdio]
    for number, fd in enumerate(copies):
        os.dup2(fd, number)
        os.close(fd)


def labels(init: Init) -> None:
    confinement.write(init.proc_fd, _own(init, "attr"), init.process)


def _own(init: Init, file: str) -> str:
    """The file under this process's directory: /proc/self is a link, which `open_beneath` does not follow."""
    return f"{os.readlink('self', dir_fd=init.proc_fd)}/{file}"


def enter_cgroup(init: Init) -> None:
    # As late as it can be: until here what the interpreter uses is its caller's memory, so a limit of a few MiB
    # does not kill it (threats O34).
    if init.setup.gate is not None:
        init.setup.gate.enter()
    if init.spec.has_new("cgroup"):
        unshare(CLONE_NEWCGROUP)


def scheduler(init: Init) -> None:
    assert init.process.scheduler is not None  # the table says when
    process.set_scheduler(init.process.scheduler)


def privileges(init: Init) -> None:
    set_no_new_privs()


def directory(init: Init) -> None:
    root = init.in_root
    try:
        process.enter_directory(root.fd, init.process.cwd)
    except OSError as error:
        raise RuntimeFailure.of(
            error, what=f'chdir to cwd ("{init.process.cwd}") set in config.json failed', code="invalid_argument"
        ) from None


def close_files(init: Init) -> None:
    # Before the identity changes and before anything of the image is looked at: an fd of the host that is still open
    # when a path of the config is resolved is a way out (CVE-2024-21626).
    root = init.in_root
    init.env = process.environment(init.process, root.fd)
    root.close()
    keep = {init.channel.fileno(), init.setup.listener.fileno()}
    process.close_all_but(keep, init.setup.preserve_fds)
    process.set_few_files(init.process.rlimits)
    init.proc_fd = -1


def become_user(init: Init) -> None:
    init.identity = process.Identity(init.process, init.warn)
    init.identity.drop()
    # setuid and capset made it dumpable or not as the kernel likes: until execve nobody reads this interpreter.
    set_dumpable(init.setup.dumpable)


def look_up_command(init: Init) -> None:
    process.verify_directory()
    init.command = process.find_command(init.process.args[0], init.env)


def load_filter(init: Init) -> None:
    if init.setup.filter is None:
        return
    try:
        listener = init.setup.filter()
    except OSError as error:
        raise RuntimeFailure.of(error, step="seccomp", what="load the seccomp filter") from None
    init.setup.filter = None
    if listener >= 0:
        init.channel.offer(listener)
        os.close(listener)


def notifies(init: Init) -> bool:
    """True when the seccomp profile has an agent to ask."""
    return init.spec.seccomp is not None and bool(init.spec.seccomp.listener_path)


def needs_proc(init: Init) -> bool:
    """True when something is going to be written to procfs."""
    return bool(init.spec.sysctl or init.process.apparmor_profile or init.process.selinux_label)


STEPS = (
    Step("session", session),
    Step("user namespace", be_root, when=lambda init: init.spec.has("user")),
    # As the root of the container: a key belongs to who made it, and is counted against him.
    Step("keyring", keyring, when=lambda init: not init.setup.no_new_keyring),
    # Before the mounts: sysfs shows the network namespace, mqueue the IPC namespace of who mounts it.
    Step("namespaces", join_namespaces, when=lambda init: init.setup.joins),
    Step("loopback", bring_up_loopback, when=lambda init: init.spec.has_new("network")),
    # Before any mount of ours, which must not travel to the host.
    Step("propagation", isolate_mounts),
    Step("rootfs", make_root),
    # While the host's /proc is there to fall back to.
    Step("proc", private_proc, when=needs_proc),
    # Sources are host paths, so before the pivot.
    Step("mounts", fill_root),
    # The devpts is mounted now, and /dev has its files.
    Step("console", console, when=lambda init: init.process.terminal),
    Step("createRuntime hooks", runtime_hooks, when=lambda init: has_runtime_hooks(init.spec)),
    Step("createContainer hooks", container_hooks, when=lambda init: init.spec.hooks.create_container),
    Step("pivot", pivot),
    Step("names", names),
    # After the namespaces are all there; before /proc/sys becomes read-only, though the handle is our own.
    Step("sysctl", sysctls, when=lambda init: init.spec.sysctl),
    # After everything that wants to write below.
    Step("protection", protect),
    Step("limits", limits),
    # Takes the controlling terminal, so after setsid; chown of it needs the rights that are about to go.
    Step("terminal", terminal),
    Step("labels", labels, when=lambda init: init.process.apparmor_profile or init.process.selinux_label),
    Step("cgroup", enter_cgroup),
    # The budget of a real-time policy is the cgroup's.
    Step("scheduler", scheduler, when=lambda init: init.process.scheduler is not None),
    # With the rights of root, as the peers do: the user may not be able to pass through every parent.
    Step("cwd", directory),
    Step("files", close_files),
    Step("no_new_privs", privileges, when=lambda init: init.process.no_new_privileges),
    # After masks, terminal and cgroup: all of those need rights.
    Step("identity", become_user),
    # As the user and from the working directory, so that it says what execve would.
    Step("command", look_up_command),
    # At create, as the peers do: its agent takes the listener, or the create fails. The last step, for what follows
    # goes by the filter. Other filters are loaded by `start`.
    Step("seccomp", load_filter, when=notifies),
)


def has_runtime_hooks(spec: Spec) -> bool:
    """True when the caller has hooks to run in the middle."""
    return bool(spec.hooks.prestart or spec.hooks.create_runtime)


def set_up(init: Init) -> None:
    """All steps. Raises RuntimeFailure with the one that failed."""
    progress = init.setup.progress
    for number, entry in enumerate(STEPS):
        if entry.when is None or entry.when(init):
            progress.at(number)
            try:
                failpoint(f"init.{entry.name}")
                entry.run(init)
            except BaseException as error:
                raise RuntimeFailure.of(error, step=entry.name) from None
    progress.at(len(STEPS))


def main(setup: Setup, channel: sync.Channel) -> NoReturn:
    """The whole life of the init until execve. Never returns, and no exception leaves it."""
    step = "session"
    try:
        init = Init(setup, channel)
        channel.receive("Go")
        set_up(init)
        step = "wait"
        channel.send("Ready", text=tuple(init.warnings))
        if channel.receive("Go", "Start")[0].kind == "Go":
            channel.close()
            init.channel = channel = sync.accept(setup.listener)
        step = "start"
        setup.listener.close()
        start(init)
    except sync.Closed:
        os._exit(1)  # the caller was killed: a container that nobody knows of must not be (threats O37)
    except BaseException as error:
        channel.fail(RuntimeFailure.of(error, step=step))
        os._exit(1)
    os._exit(1)


def start(init: Init) -> None:
    """From Start to execve: as few system calls as can be, since the filter is in force for the last of them."""
    if init.spec.hooks.start_container:
        known = init.setup.state(os.getpid(), "created")
        from runtime import hooks  # as above

        hooks.run(init.spec.hooks.start_container, known, "startContainer hooks", env=init.env)
    process.reset_signals()
    load_filter(init)
    if init.identity is not None:
        init.identity.finish()
    if init.setup.stays_behind:
        from runtime import reaper  # the caller of the init has imported it

        reaper.stay_behind(terminal=init.process.terminal)
    process.execute(init.command, init.process.args, init.env)
