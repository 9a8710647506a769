"""The least that a kubelet can belong to: etcd and kube-apiserver on loopback. No scheduler and no controllers: pods
name their node, and nothing makes service accounts. Whoever has the token may do everything.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from conformance.kubelet.kubectl import Kubectl
from conformance.kubelet.node import ADDRESS
from conformance.kubelet.service import Service

ETCD, PEERS, API_SERVER = 12379, 12380, 16443


@contextlib.contextmanager
def cluster(base: Path, api_server: Path, kubectl: Path) -> Iterator[Kubectl]:
    """Serves until the block ends; the kubeconfig that kubectl has is the kubelet's, too."""
    base.mkdir()
    token = secrets.token_hex(16)
    (base / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    _keys(base)
    address = f"https://127.0.0.1:{API_SERVER}"
    kubeconfig = base / "kubeconfig"
    kubeconfig.write_text(json.dumps(_kubeconfig(address, token)))
    etcd = Service("etcd", _etcd(base), base / "etcd.log", lambda: _answers(f"http://127.0.0.1:{ETCD}/health", ""))
    server = Service(
        "kube-apiserver",
        _api_server(base, api_server),
        base / "kube-apiserver.log",
        lambda: _answers(f"{address}/readyz", token),
    )
    try:
        etcd.start()
        server.start()
        yield Kubectl(kubectl, kubeconfig)
    finally:
        server.stop()
        etcd.stop()


def _etcd(base: Path) -> list[str]:
    clients, peers = f"http://127.0.0.1:{ETCD}", f"http://127.0.0.1:{PEERS}"
    return [
        "etcd",
        f"--data-dir={base}/etcd",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
    ]


def _api_server(base: Path, binary: Path) -> list[str]:
    return [
        str(binary),
        f"--etcd-servers=http://127.0.0.1:{ETCD}",
        "--bind-address=127.0.0.1",
        f"--secure-port={API_SERVER}",
        f"--advertise-address={ADDRESS}",
        "--endpoint-reconciler-type=none",
        f"--cert-dir={base}/certificates",
        f"--token-auth-file={base}/tokens.csv",
        "--authorization-mode=AlwaysAllow",
        "--service-cluster-ip-range=10.96.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={base}/accounts.pub",
        f"--service-account-signing-key-file={base}/accounts.key",
        # A controller would make the accounts that it asks for.
        "--disable-admission-plugins=ServiceAccount",
        "--kubelet-preferred-address-types=InternalIP",
    ]


def _kubeconfig(address: str, token: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": address, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        "current-context": "here",
    }


def _keys(base: Path) -> None:
    """What tokens of service accounts are signed with: there must be one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (base / "accounts.key").write_bytes(private)
    (base / "accounts.pub").write_bytes(public)


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    context = ssl._create_unverified_context()  # noqa: S323  it signs its certificate itself
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5, context=context) as reply:
        return bool(reply.status == 200)
    return False
