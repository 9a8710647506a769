"""A step: what is to be so, and the pods it is seen on. The pods of all steps are applied at once, as on a node that
comes up; then the steps are played one after the other, so that their waiting is shared."""

from __future__ import annotations

import contextlib
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from conformance.clients.steps import Score, Surprise
from conformance.kubelet.node import Node
from conformance.kubelet.pods import Document

FAILURES = (OSError, LookupError, ValueError, subprocess.SubprocessError, RuntimeError, grpc.RpcError)


def _none(node: Node) -> list[Document]:
    return []


@dataclass(frozen=True, slots=True)
class Step:
    check: Callable[[Node], None]
    pods: Callable[[Node], list[Document]] = _none

    @property
    def name(self) -> str:
        return self.check.__name__


@contextlib.contextmanager
def applied(node: Node, *documents: Document) -> Iterator[None]:
    """Pods that are there in the block, and gone after it: for steps whose pods need something that ends with them."""
    for document in documents:
        node.apply(document)
    try:
        yield
    finally:
        for document in documents:
            node.withdraw(document["metadata"]["name"])
        for document in documents:
            node.until_gone(document["metadata"]["name"])


@contextlib.contextmanager
def configured(node: Node, **changes: Any) -> Iterator[None]:
    """The kubelet starts anew with these changes, and again without them."""
    before = dict(node.changes)
    node.kubelet.stop()
    node.configure(**changes)
    node.kubelet.start()
    try:
        yield
    finally:
        node.kubelet.stop()
        node.changes = before
        node.configure()
        node.kubelet.start()


def play(node: Node, steps: Sequence[Step]) -> Score:
    """Applies, checks and withdraws, and prints each step with its time."""
    applied = [document for step in steps for document in step.pods(node)]
    for document in applied:
        node.apply(document)
    score = Score()
    for step in steps:
        began = time.perf_counter()
        failure = ""
        try:
            step.check(node)
        except Surprise as error:
            failure = str(error)
        except FAILURES as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {error} ({where.name}, {Path(where.filename).name}:{where.lineno})"
        score.add(Score(passed=int(not failure), failed=int(bool(failure))))
        print(
            f"  {step.name:24} {time.perf_counter() - began:6.1f} s  {failure and 'FAILED: '}{failure or 'ok'}",
            flush=True,
        )
    for document in applied:
        node.withdraw(document["metadata"]["name"])
    return score
