"""The kubelet's endpoint for checkpoints: what becomes of its call when there is no criu, when criu fails, when it does
its work; and that the container runs on every time.

The criu of this lane is a script that says which one it is: the machine's own, or the one of the tests that speaks as
criu and dumps nothing (tests/fakes/criu.py), since Debian's does not run on every kernel."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

from conformance.clients.steps import Surprise, eventually, expect, holds, same
from conformance.kubelet.node import Node
from conformance.kubelet.pods import Document, container, pod
from conformance.kubelet.step import Step

CLONE = Path(__file__).parents[2]
PATH = "/checkpoint/default/counting-node0/main?timeout=60"


def checkpoint_pods(node: Node) -> list[Document]:
    count = "i=0; echo x >/written; while :; do i=$((i+1)); echo $i >/out/counted; sleep 0.05; done"
    return [pod("counting", container("main", node.images["busybox"], count))]


def checkpoint(node: Node) -> None:
    """First without any, then with the machine's, then with one that pretends: once as it fails, once as it works."""
    node.until_ready("counting")
    before = node.running("counting")
    holds("without criu", _refused(node), "executable file not found")
    _criu(node, "exec criu")
    fails = _dumps_nothing(node)
    pretends = node.base / "pretends"
    pretends.mkdir()
    _criu(node, f"cd {CLONE} && exec {sys.executable} -m tests.fakes.criu {pretends}")
    (pretends / "plan").write_text("fail")
    holds("when criu fails", _refused(node), "criu failed: type DUMP")
    (pretends / "plan").write_text("ok")
    _works(node, before["main"])
    same("the container", node.running("counting"), before)
    if fails:
        print(f"    the machine's own criu: {fails}")


def _criu(node: Node, what: str) -> None:
    script = node.base / "criu"
    script.write_text(f'#!/bin/sh\n{what} "$@"\n')
    script.chmod(0o755)


def _goes_on(node: Node) -> None:
    seen = node.out("counted")
    eventually(lambda: node.out("counted") not in ("", seen), "the container counts on", 20)


def _refused(node: Node) -> str:
    """What the kubelet answers to a checkpoint that must fail."""
    try:
        node.call(PATH, "POST")
    except Surprise as error:
        holds("the answer", str(error), "500", "checkpointing of default/counting-node0/main failed", "rpc error")
        same("archives", _archives(node), [])
        _goes_on(node)
        return str(error)
    raise Surprise("a checkpoint without a criu that works is said to be there")


def _works(node: Node, container_id: str) -> None:
    (path,) = json.loads(node.call(PATH, "POST"))["items"]
    same("archives", _archives(node), [Path(path)])
    with tarfile.open(path) as archive:
        spec = json.load(archive.extractfile("spec.dump"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile("config.dump"))  # type: ignore[arg-type]
    same("the container in the archive", config["id"], container_id)
    expect("written" in str(spec["process"]["args"]), f"the command in the archive: {spec['process']['args']}")
    same("who may read it", oct(Path(path).stat().st_mode & 0o777), "0o600")
    Path(path).unlink()
    _goes_on(node)


def _dumps_nothing(node: Node) -> str:
    """Why the machine's own criu cannot; "" where it can, and has."""
    try:
        node.call(PATH, "POST")
    except Surprise as error:
        holds("the answer", str(error), "500", "criu failed: ")
        return str(error).partition("criu failed: ")[2]
    for path in _archives(node):
        path.unlink()
    return ""


def _archives(node: Node) -> list[Path]:
    return sorted((node.base / "kubelet" / "checkpoints").glob("*"))


STEPS = (Step(checkpoint, checkpoint_pods),)
