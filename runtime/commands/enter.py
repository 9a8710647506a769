"""`ocirun exec`.

The process is config.json's own with what the flags change, or the whole of --process. Refuses names as users: they
would be looked up in a file of the image. Invariant: the exit code of an attached exec is the process's.
"""

from __future__ import annotations

from runtime import exec as execution
from runtime import exec_cgroup, state
from runtime.errors import RuntimeFailure
from runtime.fields import Fields, decode
from runtime.foreground import Foreground, check_terminal, sized
from runtime.linux.files import AT_FDCWD, read_bounded
from runtime.options import Flag, UsageError
from runtime.spec_process import parse_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cli import Context
    from runtime.options import Values

_MAX_PROCESS = 16 << 20
# What a process object that does not have it takes from the container's.
_INHERITED = (
    *("capabilities", "rlimits", "apparmorProfile", "selinuxLabel"),
    *("ioPriority", "scheduler", "execCPUAffinity"),
)
FLAGS = {
    "exec": (
        Flag(("console-socket",), "str", "unix socket that is sent the terminal's master"),
        Flag(("pidfd-socket",), "str", "unix socket that is sent a pidfd of the process"),
        Flag(("cwd",), "str", "working directory"),
        Flag(("env", "e"), "list", "NAME=VALUE, again for more"),
        Flag(("tty", "t"), "bool", "give it a terminal"),
        Flag(("user", "u"), "str", "UID[:GID]"),
        Flag(("additional-gids", "g"), "list", "a further group, again for more"),
        Flag(("process", "p"), "str", "file with the whole process object"),
        Flag(("detach", "d"), "bool", "do not wait for it"),
        Flag(("pid-file",), "str", "file to write its process id to"),
        Flag(("process-label",), "str", "SELinux label"),
        Flag(("apparmor",), "str", "AppArmor profile"),
        Flag(("no-new-privs",), "bool", "set no_new_privs"),
        Flag(("cap", "c"), "list", "a further capability, again for more"),
        Flag(("preserve-fds",), "int", "how many descriptors from 3 on it gets"),
        Flag(("cgroup",), "list", "[CONTROLLER[,…]:]PATH of an existing cgroup below the container's"),
        Flag(("ignore-paused",), "bool", "also into a paused container"),
    )
}
WORDS = {"exec": "CONTAINER COMMAND [ARGUMENT …]"}


def run(context: Context, _name: str, values: Values) -> int:
    if not values.words:
        raise UsageError(f'"exec" requires a minimum of 1 argument(s): {WORDS["exec"]}')
    handed_on = 0
    if values.given("preserve-fds"):
        from runtime.inherited import descriptors  # first of all: what is opened from here on has a higher number

        handed_on = descriptors(values.number("preserve-fds"))
    container_id, words = values.words[0], values.words[1:]
    facts = state.load(context.root, container_id)
    if not words and not values.text("process"):
        raise RuntimeFailure("process args cannot be empty", code="invalid_argument")
    process = parse_process(_process(facts.bundle, words, values, apart=context.shell_codes), "process")
    detached, console_socket = values.on("detach"), values.text("console-socket")
    check_terminal(process.terminal, detached, console_socket)
    if process.terminal and not console_socket:
        process = sized(process)
    request = execution.ExecRequest(
        root=context.root,
        id=container_id,
        process=process,
        console_socket=console_socket,
        pid_file=values.text("pid-file"),
        pidfd_socket=values.text("pidfd-socket"),
        preserve_fds=handed_on,
        cgroups=exec_cgroup.parse(values.all("cgroup")),
        ignore_paused=values.on("ignore-paused"),
    )
    if detached:
        for text in execution.execute(request).warnings:
            context.warn(text)
        return 0
    with Foreground(subreaper=False) as foreground:
        executed = execution.execute(request)
        for text in executed.warnings:
            context.warn(text)
        return foreground.follow(executed.pid, executed.console)


def _process(bundle: str, words: list[str], values: Values, *, apart: bool) -> dict[str, object]:
    """`apart`: another user has none of the groups of the container's own, which with runc he has."""
    if values.text("process"):
        return _from_file(values.text("process"), bundle)
    process = _containers(bundle)
    process["args"] = words
    process["terminal"] = values.on("tty")
    process.pop("consoleSize", None)
    if values.text("cwd"):
        process["cwd"] = values.text("cwd")
    env = process.get("env")
    process["env"] = [*(env if isinstance(env, list) else []), *values.all("env")]
    if values.text("user") or values.all("additional-gids"):
        own = process.get("user")
        if apart and isinstance(own, dict) and values.text("user"):
            own = {key: value for key, value in own.items() if key != "additionalGids"}
        process["user"] = _user(own, values)
    if values.text("apparmor"):
        process["apparmorProfile"] = values.text("apparmor")
    if values.text("process-label"):
        process["selinuxLabel"] = values.text("process-label")
    if values.given("no-new-privs"):
        process["noNewPrivileges"] = values.on("no-new-privs")
    if values.all("cap"):
        process["capabilities"] = _capabilities(process.get("capabilities"), values.all("cap"))
    return process


def _containers(bundle: str) -> dict[str, object]:
    """The process of config.json."""
    config = Fields(decode(read_bounded(AT_FDCWD, f"{bundle}/config.json", _MAX_PROCESS), "config.json"))
    found = config.raw("process")
    return dict(found) if isinstance(found, dict) else {"cwd": "/"}


def _from_file(path: str, bundle: str) -> dict[str, object]:
    """A process object, which has of the container's own what it does not say itself, as with runc. The file may be a
    pipe, as shells make them."""
    with open(path, "rb") as file:
        raw = file.read(_MAX_PROCESS + 1)
    if len(raw) > _MAX_PROCESS:
        raise RuntimeFailure(f"{path}: more than {_MAX_PROCESS} bytes", code="invalid_argument")
    document = decode(raw, path)
    if not isinstance(document, dict):
        raise RuntimeFailure(f"{path}: expected a process object", code="invalid_argument")
    try:
        own = _containers(bundle)
    except OSError:  # nobody has to keep a bundle: then it has no more than what it says
        own = {}
    for key in _INHERITED:
        if document.get(key) in (None, "", []) and own.get(key):
            document[key] = own[key]
    return document


def _user(before: object, values: Values) -> dict[str, object]:
    user: dict[str, object] = dict(before) if isinstance(before, dict) else {}
    if values.text("user"):
        # The numbers are exactly what they say: "1" is never 0, and never a name (CVE-2026-30892, CVE-2016-3697).
        uid, colon, gid = values.text("user").partition(":")
        user["uid"] = _number("--user", uid)
        if colon:
            user["gid"] = _number("--user", gid)
    if values.all("additional-gids"):
        have = user.get("additionalGids")
        more = [_number("--additional-gids", gid) for gid in values.all("additional-gids")]
        user["additionalGids"] = [*(have if isinstance(have, list) else []), *more]
    return user


def _number(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10:
        raise RuntimeFailure(f"{flag}: {text[:40]!r} is no number", code="invalid_argument")
    return int(text)


def _capabilities(before: object, names: list[str]) -> dict[str, object]:
    """As runc: into the bounding, effective and permitted sets, and into the ambient one only where inheritable."""
    sets: dict[str, object] = dict(before) if isinstance(before, dict) else {}
    kinds = ["bounding", "effective", "permitted"]
    if sets.get("inheritable"):
        kinds.append("ambient")
    for kind in kinds:
        have = sets.get(kind)
        sets[kind] = list(dict.fromkeys([*(have if isinstance(have, list) else []), *names]))
    return sets
