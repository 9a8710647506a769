"""Plugins of a kubelet, as a vendor of devices would write them: one of the device plugin API (v1beta1), one of dynamic
resource allocation (v1). Both hand out tokens: a device node, and a CDI device whose spec they write.

    device plugin:  Register ─▶ kubelet.sock      kubelet ─▶ tokens.sock: ListAndWatch, Allocate(ids)
    DRA driver:     plugins_registry/NAME.sock    kubelet ─▶ GetInfo; then NodePrepareResources(claims), Unprepare

Needs grpcio-tools, which reads the .proto files beside this one. Invariant: whatever ends the `with`, no socket is
served any more, and no CDI spec of theirs is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

RESOURCE = "tokens.ocid.invalid/token"
DRIVER = "claims.ocid.invalid"
TOKENS = ("red", "blue")
# A character device that no container has by itself, and that may be opened by anybody without doing anything (fuse).
NODE_NUMBER = os.makedev(10, 229)
CDI = Path("/var/run/cdi")
DEVICE_PLUGINS = Path("/var/lib/kubelet/device-plugins")
_PROTOS = Path(__file__).parent


def _generated(name: str) -> tuple[Any, Any]:
    """Messages and services of a .proto file beside this module."""
    package = Path(*__package__.split("."))
    return grpc.protos_and_services(str(package / f"{name}.proto"))  # type: ignore[no-any-return]


def _served(socket: Path) -> grpc.Server:
    """A server that is to listen there once its services are added."""
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_insecure_port(f"unix://{socket}")
    return server


def node(directory: Path) -> Path:
    """The device node that both hand out; it lies where no container looks."""
    path = directory / "token-device"
    if not path.exists():
        os.mknod(path, 0o666 | stat.S_IFCHR, NODE_NUMBER)
        path.chmod(0o666)  # whatever the umask is
    return path


def cdi_spec(kind: str, devices: dict[str, dict[str, Any]]) -> Path:
    """Writes the spec of a vendor's devices, name to edits, where runtimes look for it."""
    CDI.mkdir(exist_ok=True)
    path = CDI / f"{kind.replace('/', '-')}.json"
    described = [{"name": name, "containerEdits": edits} for name, edits in devices.items()]
    path.write_text(json.dumps({"cdiVersion": "0.6.0", "kind": kind, "devices": described}))
    return path


@contextlib.contextmanager
def device_plugin(directory: Path) -> Iterator[None]:
    """Two tokens, for as long as the block lasts. Who is given TOKEN gets it as $TOKEN, at /dev/token (to read only),
    as a file at /token, and by CDI as $TOKEN_BY_CDI."""
    messages, services = _generated("device_plugin")
    over = threading.Event()

    class Plugin:
        def GetDevicePluginOptions(self, request: Any, context: Any) -> Any:
            return messages.DevicePluginOptions()

        def ListAndWatch(self, request: Any, context: Any) -> Iterator[Any]:
            yield messages.ListAndWatchResponse(
                devices=[messages.Device(ID=token, health="Healthy") for token in TOKENS]
            )
            over.wait()

        def Allocate(self, request: Any, context: Any) -> Any:
            given = [one(*wanted.devices_ids) for wanted in request.container_requests]
            return messages.AllocateResponse(container_responses=given)

    def one(token: str) -> Any:
        path = messages.DeviceSpec(container_path="/dev/token", host_path=str(node(directory)), permissions="r")
        (directory / token).write_text(f"the {token} one\n")
        return messages.ContainerAllocateResponse(
            envs={"TOKEN": token},
            mounts=[messages.Mount(container_path="/token", host_path=str(directory / token), read_only=True)],
            devices=[path],
            annotations={"tokens.ocid.invalid/given": token},
            cdi_devices=[messages.CDIDevice(name=f"{RESOURCE}={token}")],
        )

    spec = cdi_spec(RESOURCE, {token: {"env": [f"TOKEN_BY_CDI={token}"]} for token in TOKENS})
    socket = DEVICE_PLUGINS / "tokens.sock"
    server = _served(socket)
    services.add_DevicePluginServicer_to_server(Plugin(), server)
    server.start()
    try:
        with grpc.insecure_channel(f"unix://{DEVICE_PLUGINS}/kubelet.sock") as channel:
            request = messages.RegisterRequest(version="v1beta1", endpoint=socket.name, resource_name=RESOURCE)
            services.RegistrationStub(channel).Register(request, timeout=20)
        yield
    finally:
        over.set()
        server.stop(grace=5).wait()
        spec.unlink()


class Driver:
    """What the driver was asked: `registered` what the kubelet said of it, `prepared` the claims that are."""

    def __init__(self) -> None:
        self.registered: list[tuple[bool, str]] = []
        self.prepared: list[str] = []


@contextlib.contextmanager
def dra_driver(directory: Path, registry: Path) -> Iterator[Driver]:
    """A driver whose one device is "claimed", found by its socket in `registry`. A claim that is prepared has a CDI
    device of its own: /dev/claimed, $CLAIM with the claim's name, its uid in the file /claim."""
    about, finding = _generated("plugin_registration")
    messages, services = _generated("dra")
    driver = Driver()
    kind = f"{DRIVER}/claim"
    own = directory / "dra.sock"

    class Registration:
        def GetInfo(self, request: Any, context: Any) -> Any:
            return about.PluginInfo(
                type="DRAPlugin", name=DRIVER, endpoint=str(own), supported_versions=["v1.DRAPlugin"]
            )

        def NotifyRegistrationStatus(self, request: Any, context: Any) -> Any:
            driver.registered.append((request.plugin_registered, request.error))
            return about.RegistrationStatusResponse()

    class Plugin:
        def NodePrepareResources(self, request: Any, context: Any) -> Any:
            return messages.NodePrepareResourcesResponse(claims={one.uid: prepare(one) for one in request.claims})

        def NodeUnprepareResources(self, request: Any, context: Any) -> Any:
            for claim in request.claims:
                driver.prepared.remove(claim.uid)
            (CDI / f"{kind.replace('/', '-')}.json").unlink()
            done = {claim.uid: messages.NodeUnprepareResourceResponse() for claim in request.claims}
            return messages.NodeUnprepareResourcesResponse(claims=done)

    def prepare(claim: Any) -> Any:
        (directory / "claim").write_text(claim.uid)
        mount = {"hostPath": str(directory / "claim"), "containerPath": "/claim", "options": ["ro", "bind"]}
        device = {"path": "/dev/claimed", "hostPath": str(node(directory)), "permissions": "rw"}
        cdi_spec(kind, {claim.uid: {"env": [f"CLAIM={claim.name}"], "deviceNodes": [device], "mounts": [mount]}})
        driver.prepared.append(claim.uid)
        given = messages.Device(
            request_names=["one"], pool_name="here", device_name="claimed", cdi_device_ids=[f"{kind}={claim.uid}"]
        )
        return messages.NodePrepareResourceResponse(devices=[given])

    server = _served(own)
    services.add_DRAPluginServicer_to_server(Plugin(), server)
    server.start()
    door = _served(registry / f"{DRIVER}.sock")
    finding.add_RegistrationServicer_to_server(Registration(), door)
    door.start()
    try:
        yield driver
    finally:
        door.stop(grace=5).wait()
        server.stop(grace=5).wait()
        (CDI / f"{kind.replace('/', '-')}.json").unlink(missing_ok=True)
