"""`ocid run`: an image reference to a running, supervised process, with or without a daemon.

One pod with one container, through the same CRI verbs that a kubelet uses; attached, its streams go between the
terminal and the shim. Refuses --rm with --detach: nobody would be there to do it; and --restart without it: what is
attached to one run would not be to the next. Whose output nobody reads any more is ended, as any command in a pipeline
is. Invariant: a start that fails leaves nothing behind, and the exit code is the container's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import Any

from cri.api import api_pb2 as pb
from cri.cli import addresses, more_options, names, options
from cri.cli.attach import Streams
from cri.cli.connect import Api, ApiError, connect
from cri.cli.main import CommandError
from cri.cli.pull import Wanted, present
from cri.cli.registry_options import given_keys, keys_argument, packed
from cri.cli.rm import drop_pod, remove
from cri.cli.watch import wait_exit
from cri.marks import INIT, LOGS, NAME_LABEL, NAMESPACE, RESTART
from runtime.errors import RuntimeFailure
from runtime.linux.failpoint import failpoint
from runtime.linux.files import remove_tree
from runtime.shim.client import Shims
from runtime.shim.restarts import most_restarts

_LOCAL_SOURCES = ("oci", "oci-archive", "docker-archive")
_NO_NAME = re.compile(r"[^A-Za-z0-9]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", "--detach", action="store_true", help="print the id and leave it running")
    add("-i", "--interactive", action="store_true", help="pass standard input on")
    add("-t", "--tty", action="store_true", help="give it a terminal")
    add("--rm", action="store_true", help="remove it when it has ended")
    add("--name", help="what to call it (default: made from the image's name)")
    add(
        "--net",
        "--network",
        metavar="host|none|NAME",
        default="",
        help="network: the host's, none, or a CNI network (default: the first)",
    )
    add("--exec", "--entrypoint", metavar="PATH", dest="entrypoint", help="run this instead of the image's entrypoint")
    add(
        "-p",
        "--publish",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a port of the host for one of its own",
    )
    add(
        "-v",
        "--volume",
        action="append",
        default=[],
        metavar="SRC:DST[:OPTION,…]",
        help="mount a directory or file of the host; OPTION is ro, rro (read-only with all below), rprivate, rslave or "
        "rshared",
    )
    more_options.arguments(parser)
    add("-e", "--env", action="append", default=[], metavar="K[=V]", help="set a variable; K alone: to what it is here")
    add("--env-file", action="append", default=[], metavar="FILE", help="set the variables that its lines say")
    add("-l", "--label", action="append", default=[], metavar="K[=V]", help="a label, for ocid ps --filter")
    add("-u", "--user", metavar="USER[:GID]", help="run as this user")
    add("-w", "--workdir", metavar="DIR", default="", help="start in this directory")
    add("-m", "--memory", metavar="SIZE", help="memory limit, such as 256m; swap is within it")
    add("--cpus", type=float, metavar="N", help="CPU limit, such as 1.5")
    add(
        "--restart",
        metavar="no|on-failure[:N]|always",
        default="no",
        help="with -d: start it again when it has ended, until it is stopped; not after this machine has started anew",
    )
    add("--init", action="store_true", help="run a tiny init as process 1, which reaps and passes signals on")
    add("--read-only", action="store_true", help="a root filesystem that cannot be written to")
    add("--privileged", action="store_true", help="all capabilities and devices of this node, no seccomp")
    add("-h", "--hostname", default="", help="its host name (default: its name)")
    add("--pull", choices=("missing", "always", "never"), default="missing", help="when to fetch (default: missing)")
    keys_argument(parser)
    add("image", help="reference, docker://…, oci:DIR[:TAG], oci-archive:FILE or docker-archive:FILE")
    words = add("command", nargs=argparse.REMAINDER, help="command and arguments (default: the image's)")
    words.required = False  # what is missing where both are is the image


def run(args: argparse.Namespace) -> int:
    if args.rm and args.detach:
        raise CommandError("--rm needs somebody to wait for the end: leave out --detach")
    if (policy := _policy(args.restart)) and not args.detach:
        raise CommandError(f"--restart {policy} needs --detach; ocid logs -f shows what each run prints")
    if args.tty and args.interactive and not os.isatty(0):
        raise CommandError("-t: standard input is not a terminal")
    if args.publish and args.net in ("host", "none"):
        raise CommandError(f"-p: with --net={args.net} there are no ports of its own to publish: leave out one of them")
    if args.decryption_key or not all(map(os.path.isfile, [*args.env_file, *filter(None, [args.config])])):
        addresses.random()  # here: what is no file is read once, and then an image may have to be fetched
    name = args.name or _make_name(args.image)
    if not _NAME.fullmatch(name):
        raise CommandError(f"--name: {name!r} is not made of letters, digits, '.', '_' and '-' (at most 63)")
    return asyncio.run(_run(args, name))


def _policy(text: str) -> str:
    """What --restart says, "" for no."""
    try:
        most_restarts(text)
    except RuntimeFailure as error:
        raise CommandError(f"--restart: {error}") from None
    return "" if text == "no" else text


def _make_name(image: str) -> str:
    base = _NO_NAME.sub("-", image.rpartition("/")[2].partition("@")[0].partition(":")[0]).strip("-")
    return f"{base[:40] or 'container'}-{os.urandom(3).hex()}"


async def _run(args: argparse.Namespace, name: str) -> int:
    # What the options have wrong is told at once, before anybody is asked for anything.
    sandbox_config, config = _sandbox_config(args, name), _container_config(args, name)
    # Without a daemon the root belongs to whoever works in it: it is let go while the container runs.
    async with connect(args) as api:
        state, direct = Path(api.config.state), api.local is not None
        pod, container, streams = await _launch(api, args, sandbox_config, config)
    if streams is None:
        print(container)
        return 0
    shims, sandbox = Shims(state, direct=direct), names.sandbox(state, pod)
    await streams.copy(lambda number: shims.signal(sandbox, container, number))
    async with connect(args) as api:
        if streams.left:
            await _leave(api, args, streams.left, pod, container)
            if streams.trouble:
                raise CommandError(f"{streams.trouble}; the container was ended")
            return 128 + streams.left
        code = await wait_exit(api, container)
        if args.rm:
            await remove(api, await names.find(api, container))
        else:
            await api.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    return code


async def _leave(api: Api, args: argparse.Namespace, number: int, pod: str, container: str) -> None:
    """What becomes of a container that runs when this process is to end. Its own terminal has the last word on it:
    without --rm it is told, and may run on."""
    if args.rm:
        await remove(api, await names.find(api, container))
    elif number == signal.SIGPIPE:
        await api.call("StopContainer", pb.StopContainerRequest(container_id=container, timeout=0))
        await api.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod))
    else:
        with contextlib.suppress(RuntimeFailure):  # it has ended by itself
            Shims(api.config.state, direct=api.local is not None).signal(
                names.sandbox(api.config.state, pod), container, number
            )


async def _launch(
    api: Api, args: argparse.Namespace, sandbox_config: pb.PodSandboxConfig, config: pb.ContainerConfig
) -> tuple[str, str, Streams | None]:
    """Pod and container, started; streams where somebody watches. After a failure nothing of it is left."""
    name = sandbox_config.metadata.name
    listed = await api.call("ListContainers", pb.ListContainersRequest())
    if any(c.labels.get(NAME_LABEL) == name for c in listed.containers):
        raise CommandError(f"the name {name} is taken; ocid rm {name} frees it")
    sandbox_config.log_directory = f"{api.config.root}/{LOGS}/{sandbox_config.metadata.uid}"
    config.image.image = await _image(api, args)
    if api.local is not None and api.local.images.has_seals(config.image.image):
        addresses.random()  # CreateContainer judges signatures, and opens layers' keys, in this process
    config.image.user_specified_image = args.image
    async with api.launching(sandbox_config.metadata.uid), contextlib.AsyncExitStack() as undo:
        Path(sandbox_config.log_directory).mkdir(mode=0o700, parents=True)
        undo.callback(remove_tree, sandbox_config.log_directory)
        network = "" if args.net == "host" else args.net
        request = pb.RunPodSandboxRequest(config=sandbox_config)
        pod = str((await api.call("RunPodSandbox", request, network=network)).pod_sandbox_id)
        undo.push_async_callback(drop_pod, api, pod)
        failpoint("ocid_run.pod")
        create = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=sandbox_config)
        made = await _command(api, "CreateContainer", create, packed(given_keys(args)))
        container = str(made.container_id)
        failpoint("ocid_run.created")
        streams = None if args.detach else _attach(api, args, pod, container)
        await _command(api, "StartContainer", pb.StartContainerRequest(container_id=container))
        failpoint("ocid_run.started")
        undo.pop_all()
    return pod, container, streams


def _attach(api: Api, args: argparse.Namespace, pod: str, container: str) -> Streams:
    streams = Streams(stdin=args.interactive, terminal=args.tty)
    state = api.config.state
    shims, sandbox = Shims(state, direct=api.local is not None), names.sandbox(state, pod)
    control = shims.attach(sandbox, container, streams.for_shim, stdin=args.interactive, terminal=args.tty)
    streams.attached(control)
    return streams


async def _command(api: Api, name: str, request: Any, keys: bytes = b"") -> Any:
    """A call that fails when the command cannot be run; that has exit codes of its own."""
    try:
        return await api.call(name, request, keys=keys)
    except ApiError as error:
        raise CommandError(str(error), _exit_code(str(error))) from None


def _exit_code(message: str) -> int:
    if "step command:" not in message and "step exec:" not in message:
        return 125
    return 127 if "not found" in message or "no such file" in message else 126


async def _image(api: Api, args: argparse.Namespace) -> str:
    source, colon, rest = args.image.partition(":")
    if colon and source in _LOCAL_SOURCES:
        return await _import(api, source, rest)
    args.image = args.image.removeprefix("docker://")
    return await present(api, args.image, args.pull, Wanted(keys=given_keys(args)))


async def _import(api: Api, source: str, path: str) -> str:
    """An image from a directory or an archive of this machine: DIR[:TAG] or FILE[:TAG]."""
    from cri.cli.load import load

    where, _, tag = path.partition(":")
    return await load(api, source, Path(where), tag, "")


def _sandbox_config(args: argparse.Namespace, name: str) -> pb.PodSandboxConfig:
    config = pb.PodSandboxConfig(hostname=args.hostname or name.replace("_", "-"))
    config.metadata.name, config.metadata.namespace, config.metadata.uid = name, NAMESPACE, os.urandom(16).hex()
    config.labels[NAME_LABEL] = name
    config.port_mappings.extend(options.port(text) for text in args.publish)
    config.linux.security_context.privileged = args.privileged
    if args.net == "host":
        config.linux.security_context.namespace_options.network = pb.NODE
        config.hostname = ""
    config.linux.security_context.namespace_options.pid = pb.CONTAINER
    if args.dns or args.dns_search or args.dns_option:
        more_options.dns(config.dns_config, args)
    return config


def _container_config(args: argparse.Namespace, name: str) -> pb.ContainerConfig:
    config = pb.ContainerConfig(
        working_dir=args.workdir, tty=args.tty, stdin=args.interactive, stdin_once=args.interactive, log_path="0.log"
    )
    config.metadata.name = name
    for label in args.label:
        key, _, value = label.partition("=")
        config.labels[key] = value
    config.labels[NAME_LABEL] = name
    more_options.apply(config, args)
    if args.init:
        config.annotations[INIT] = "true"
    if policy := _policy(args.restart):
        config.annotations[RESTART] = policy
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    config.command.extend([args.entrypoint] if args.entrypoint else [])
    config.args.extend(words)
    for path in args.env_file:
        options.environment(config, options.env_file(path))
    options.environment(config, args.env)
    config.mounts.extend(_volume(text) for text in args.volume)
    config.mounts.extend(_there("--mount", mount) for mount in more_options.binds(args.mount))
    config.linux.resources.CopyFrom(options.resources(args))
    context = config.linux.security_context
    context.privileged, context.readonly_rootfs = args.privileged, args.read_only
    context.namespace_options.pid = pb.CONTAINER
    context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
    if args.net == "host":
        context.namespace_options.network = pb.NODE
    if args.user:
        options.user(context, args.user)
    return config


def _volume(text: str) -> pb.Mount:
    mount = options.volume(text)
    hint = "" if "/" in text.partition(":")[0] else "; there are no named volumes, so it is a path from here"
    return _there("-v", mount, hint)


def _there(option: str, mount: pb.Mount, hint: str = "") -> pb.Mount:
    """Of a path that is there: the CRI's calls make a directory, as a kubelet expects (docs/decisions/0014), and
    whoever types a path means one that he knows."""
    if not os.path.lexists(mount.host_path):
        raise CommandError(f"{option}: {mount.host_path} is not there{hint}")
    return mount
