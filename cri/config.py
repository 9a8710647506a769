"""The configuration as frozen values, every key with its default, its documentation and what it may be.

Refuses to read or write files: cri.config_read and cri.config_write do. Invariant: a key that is not here is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from runtime.linux.dataclass import dataclass

NATIVE = "native"
_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A configuration file that cannot be used: names file, key and what was expected."""


def _key(default: Any, doc: str, *, least: float | None = None, check: Callable[[Any], str] | None = None) -> Any:
    """A key with its documentation; `check` gives "" or what was expected."""
    metadata = {"doc": doc, "least": least, "check": check}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _section(kind: type[Any], doc: str) -> Any:
    return field(default_factory=kind, metadata={"doc": doc})


def _one_of(*words: str) -> Callable[[Any], str]:
    return lambda value: "" if value in words else f"one of {', '.join(words)}"


def _absolute(value: Any) -> str:
    return "" if Path(value).is_absolute() else "an absolute path"


def _absolute_or_none(value: Any) -> str:
    return "" if not value or Path(value).is_absolute() else 'an absolute path or ""'


def _port(value: Any) -> str:
    return "" if value < 65536 else "a port"


def _absolute_all(values: Any) -> str:
    return "" if all(Path(value).is_absolute() for value in values) else "absolute paths"


def _endpoint(value: Any) -> str:
    fine = not value or (value.startswith(("http://", "https://")) and value.isprintable() and " " not in value)
    return "" if fine else '"http://HOST:PORT", "https://HOST:PORT" or ""'


def _listen(value: Any) -> str:
    return "" if value.startswith("unix:///") else "unix:///PATH"


def _handlers(values: Any) -> str:
    wrong = [name for name, path in values.items() if path != NATIVE and not Path(path).is_absolute()]
    return f'"{NATIVE}" or the absolute path of a runc-compatible binary for {wrong[0]!r}' if wrong else ""


def _cgroup(value: Any) -> str:
    parts = value.split("/")
    fine = value.startswith("/") and value != "/" and not {".", ".."} & set(parts) and "\0" not in value
    return "" if fine else "an absolute path in the cgroup hierarchy, without . and .."


def _interface(value: Any) -> str:
    fine = 0 < len(value) <= 15 and value.isascii() and value.isprintable() and not set(value) & set("/ :")
    return "" if fine and value not in (".", "..") else "a name for a network interface, at most 15 characters"


@dataclass(frozen=True, slots=True)
class RuntimeSection:
    """[runtime]"""

    default_handler: str = _key(NATIVE, "The handler of a pod that names none. One of the handlers below.")
    handlers: Mapping[str, str] = _key(
        {NATIVE: NATIVE},
        'Handlers by name: the path of a runc-compatible binary (runc, crun), or "native", which is always there.',
        check=_handlers,
    )
    cgroup_driver: str = _key(
        "cgroupfs", "How cgroups are made. The kubelet must say the same.", check=_one_of("cgroupfs", "systemd")
    )
    cgroup_parent: str = _key(
        "/ocid",
        "The parent cgroup of pods whose request names none; for systemd a slice, where /ocid means ocid.slice.",
        check=_cgroup,
    )
    unset_seccomp: str = _key(
        "unconfined",
        "The seccomp profile of a container whose request names none: unconfined, as a kubelet expects, or default.",
        check=_one_of("unconfined", "default"),
    )
    without_selinux: str = _key(
        "refuse",
        "What becomes of SELinux labels that a pod asks for where the kernel has no SELinux: refuse, or ignore.",
        check=_one_of("refuse", "ignore"),
    )
    missing_host_paths: str = _key(
        "create",
        "What becomes of mounts of paths that are not there: create (directories, as the peers do), or refuse.",
        check=_one_of("create", "refuse"),
    )
    pod_annotations: tuple[str, ...] = _key(
        (), 'Annotations of pods that are passed on to the runtime, as patterns such as "example.com/*".'
    )
    container_annotations: tuple[str, ...] = _key((), "The same of containers, which win over their pod's.")
    cdi_dirs: tuple[Path, ...] = _key(
        (Path("/etc/cdi"), Path("/var/run/cdi")),
        "Where CDI spec files lie (Container Device Interface); a later directory wins over an earlier one.",
        check=_absolute_all,
    )
    shm_bytes: int = _key(64 << 20, "Size of a pod's /dev/shm in bytes.", least=4096)


@dataclass(frozen=True, slots=True)
class NetworkSection:
    """[network]"""

    conf_dir: Path = _key(Path("/etc/cni/net.d"), "Where CNI network lists (*.conflist) lie.", check=_absolute)
    bin_dirs: tuple[Path, ...] = _key(
        (Path("/opt/cni/bin"), Path("/usr/lib/cni")),
        "Where CNI plugins that are not built in are looked for, in this order.",
        check=_absolute_all,
    )
    lease_dir: Path = _key(
        Path("/var/lib/cni/networks"), "Where host-local notes which pod has which address.", check=_absolute
    )
    default_bridge: str = _key(
        "ocid0", "Bridge of the network that is used when conf_dir holds no network list.", check=_interface
    )
    default_subnets: tuple[str, ...] = _key(
        ("10.88.0.0/16", "10.89.0.0/16", "10.188.0.0/16", "172.31.0.0/16"),
        "Subnets for that network; the first one that no route of this node covers is taken.",
    )
    netns_pool: int = _key(4, "Network namespaces kept ready for the next pods; 0 keeps none.", least=0)


@dataclass(frozen=True, slots=True)
class ImageSection:
    """[image]"""

    hosts_dirs: tuple[Path, ...] = _key(
        tuple(Path(f"/etc/{owner}/certs.d") for owner in ("ocid", "containerd", "containers", "docker")),
        "Where registries have directories with a hosts.toml, or as docker and podman have them, with NAME.crt (an "
        "authority) and NAME.cert, NAME.key (shown to it). The first hosts.toml of a registry decides, else the first "
        "directory with such files.",
        check=_absolute_all,
    )
    registries_conf: Path = _key(
        Path("/etc/containers/registries.conf"),
        "containers-registries.conf(5), with its .d directory: asked where hosts_dirs say nothing of a registry. What "
        "it blocks is blocked.",
        check=_absolute,
    )
    auth_files: tuple[Path, ...] = _key(
        (),
        "Files with logins (docker's config.json, podman's auth.json) for pulls that bring none; the first that has "
        'one for an image decides. [] means where docker and podman put theirs; ["/dev/null"] means none.',
        check=_absolute_all,
    )
    credential_providers: str = _key(
        "",
        'A CredentialProviderConfig, as a kubelet has it: its programs are asked before auth_files. "" means none.',
        check=_absolute_or_none,
    )
    credential_provider_dir: str = _key(
        "", 'Where those programs lie; "" means beside that file.', check=_absolute_or_none
    )
    signature_policy: str = _key(
        "",
        'Which images may be pulled and run: a policy.json (containers-policy.json(5)), which must be there. "" means '
        "/etc/containers/policy.json; where that is not there either, everything is accepted.",
        check=_absolute_or_none,
    )
    signature_policy_dir: str = _key(
        "",
        "Where policies for pods of single namespaces lie, each as NAMESPACE.json; for pods of others signature_policy "
        'decides. "" means that there are none.',
        check=_absolute_or_none,
    )
    registries_d: Path = _key(
        Path("/etc/containers/registries.d"),
        "Where files say which registries have their signatures elsewhere (containers-registries.d(5)).",
        check=_absolute,
    )
    accept_unnamed_bundles: bool = _key(
        False,
        "Take sigstore bundles that name no repository, as cosign 3 makes them, for signatures of the repository that "
        "they are found in: whoever may write there may then bring in a signed image from elsewhere.",
    )
    timestamp_authorities: str = _key(
        "",
        "PEM file of time-stamping authorities (RFC 3161), roots and what leads to them, whose times count where a "
        'sigstore bundle has none of its log, as with Rekor 2. "" trusts none.',
        check=_absolute_or_none,
    )
    decryption_keys_path: str = _key(
        "/etc/ocid/keys",
        "Where private keys lie (PEM or DER, without passwords) that open encrypted layers: every file in there, and "
        'below. "" means that this node has none.',
        check=_absolute_or_none,
    )
    key_providers: str = _key(
        "",
        "ocicrypt's file of key providers: programs and services that open encrypted layers. "
        '"" is the one that OCICRYPT_KEYPROVIDER_CONFIG names, if any.',
        check=_absolute_or_none,
    )
    pinned: tuple[str, ...] = _key((), "References of images that are reported as pinned: a kubelet keeps those.")
    concurrent_pulls: int = _key(16, "Images that are pulled at once.", least=1)
    concurrent_downloads: int = _key(4, "Layers that one pull downloads at once.", least=1)
    node_downloads: int = _key(16, "Layers that all pulls download at once.", least=1)
    pull_bandwidth: int = _key(0, "Most bytes per second that one pull downloads; 0 sets no limit.", least=0)
    node_bandwidth: int = _key(0, "Most bytes per second that all pulls download together; 0 sets no limit.", least=0)
    ranges: int = _key(
        4, "Parts of a large layer that are downloaded at once where one connection is slow; 1 never does.", least=1
    )
    concurrent_unpacks: int = _key(8, "Layers that are unpacked at once, over all pulls.", least=1)
    early_unpacks: int = _key(
        2,
        "Layers that are unpacked while they are still being downloaded, over all pulls, by as many processes more; "
        "they are thrown away unless their digests turn out right. 0 unpacks only what was verified.",
        least=0,
    )
    unpack_processes: int = _key(
        0, "Processes that unpack layers, over all pulls; 0 means as many as there are CPUs.", least=0
    )
    unpack_idle_s: float = _key(10.0, "Seconds without work after which such a process ends.", least=0.1)
    keep_blobs: bool = _key(
        True,
        "Whether layers stay as the registry has them once they are unpacked: `ocid save`, pushes and repairs need "
        "them. false saves that space.",
    )
    fs_verity: bool = _key(
        True,
        "Have the kernel check whatever is read of a blob (fs-verity), where the root's filesystem was made with it. "
        "It costs hashing each blob once more when it comes.",
    )
    stall_s: float = _key(30.0, "Seconds in which a download must move, or it is broken off and resumed.", least=1)
    retries: int = _key(4, "How often a request to a registry is tried again.", least=0)
    blob_bytes: int = _key(64 << 30, "Largest layer accepted, as the registry stores it.", least=1)
    image_bytes: int = _key(256 << 30, "Largest sum of an image's layers accepted.", least=1)
    layers: int = _key(500, "Most layers of one image.", least=1)


@dataclass(frozen=True, slots=True)
class StreamSection:
    """[stream]"""

    address: str = _key(
        "127.0.0.1",
        "Where the streaming server listens. The kubelet passes on what others ask for: loopback is enough.",
    )
    port: int = _key(0, "Its port; 0 takes any free one.", least=0, check=_port)
    tls_cert: str = _key("", 'PEM file of its certificate and chain; "" serves without TLS.', check=_absolute_or_none)
    tls_key: str = _key("", 'PEM file of its key; "" where tls_cert holds it, too.', check=_absolute_or_none)
    sessions: int = _key(512, "Most exec, attach and port-forward sessions at once.", least=1)
    idle_s: float = _key(4 * 3600.0, "Seconds without a byte after which a session is ended.", least=1)


@dataclass(frozen=True, slots=True)
class LimitSection:
    """[limits]"""

    exec_output_bytes: int = _key(
        16_000_000, "Most output that ExecSync returns; what a command prints beyond it is dropped.", least=1024
    )
    message_bytes: int = _key(16 << 20, "Largest gRPC request accepted.", least=1 << 16)
    concurrent_calls: int = _key(
        512, "Most gRPC calls at once; further ones are refused as RESOURCE_EXHAUSTED.", least=8
    )
    containers: int = _key(4096, "Most containers that are kept, running or not.", least=1)
    stop_s: float = _key(30.0, "Seconds a process may take to die after SIGKILL before the call gives up.", least=1)
    recovery_s: float = _key(
        2.0, "Seconds a shim, or a half-made pod's network, may take when the daemon starts.", least=0.1
    )
    stats_s: float = _key(10.0, "Seconds between two measurements of layers, and two looks at tasks.", least=1)


@dataclass(frozen=True, slots=True)
class CheckpointSection:
    """[checkpoint]"""

    enabled: bool = _key(
        False, "Whether running containers may be checkpointed. An archive holds all of their memory: keys, tokens."
    )
    restore: bool = _key(
        False,
        "Whether pods may be restored from archives. What their processes may do is compared with the request, but "
        "criu itself reads the archive as root: enable it for archives that this node, or one like it, has written.",
    )
    criu: str = _key("criu", "The criu program: a name to look for in $PATH, or a path.")
    timeout_s: float = _key(
        600.0, "Seconds that criu may take for a container whose request says nothing; then it is killed.", least=1
    )
    archive_bytes: int = _key(256 << 30, "Largest checkpoint that is written or read.", least=1)


@dataclass(frozen=True, slots=True)
class MetricsSection:
    """[metrics]"""

    enabled: bool = _key(False, "Whether Prometheus metrics are served, at http://ADDRESS:PORT/metrics.")
    address: str = _key(
        "127.0.0.1", "Where they are served: whoever reaches that may read them, so loopback unless told."
    )
    port: int = _key(9323, "The port; 0 takes any free one.", least=0, check=_port)


@dataclass(frozen=True, slots=True)
class TracingSection:
    """[tracing]"""

    endpoint: str = _key(
        "",
        'Where OpenTelemetry spans go by OTLP over gRPC, such as "http://127.0.0.1:4317"; https is TLS; "" sends none.',
        check=_endpoint,
    )
    ratio: float = _key(
        1.0,
        "How many of the calls whose caller does not trace are traced, from 0 to 1; of the others, the caller decides.",
        least=0,
        check=lambda value: "" if value <= 1 else "a number from 0 to 1",
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    root: Path = _key(Path("/var/lib/ocid"), "What outlives a reboot: images, layers, the database.", check=_absolute)
    state: Path = _key(
        Path("/run/ocid"), "What a reboot may take: sockets, bundles, namespaces. Best on a tmpfs.", check=_absolute
    )
    listen: str = _key("unix:///run/ocid/ocid.sock", "Where the CRI is served.", check=_listen)
    log_level: str = _key("info", f"How much is logged: {', '.join(_LEVELS)}.", check=_one_of(*_LEVELS))
    log_format: str = _key(
        "text",
        "How log lines are written: text, or json, an object a line with pod and container.",
        check=_one_of("text", "json"),
    )
    runtime: RuntimeSection = _section(RuntimeSection, "How containers are run.")
    network: NetworkSection = _section(NetworkSection, "How pods are connected.")
    image: ImageSection = _section(ImageSection, "How images are pulled and kept.")
    stream: StreamSection = _section(StreamSection, "Exec, attach and port-forward.")
    checkpoint: CheckpointSection = _section(CheckpointSection, "Checkpoints of containers and pods, by criu.")
    metrics: MetricsSection = _section(MetricsSection, "Metrics of the daemon itself, for Prometheus.")
    tracing: TracingSection = _section(TracingSection, "Spans of calls, for an OpenTelemetry collector.")
    limits: LimitSection = _section(LimitSection, "Limits in number, size and time.")

    @property
    def socket(self) -> Path:
        """The path in `listen`."""
        return Path(self.listen.removeprefix("unix://"))
