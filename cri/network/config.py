"""What the pod network is told by the node's configuration: paths, limits, and the network of who has configured none.

Plain values; refuses nothing. Invariant: nothing else of the configuration reaches the network.
"""

from __future__ import annotations

from pathlib import Path

from runtime.linux.dataclass import dataclass


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Where things are and how long they may take. The subnets are tried in order for the built-in network."""

    conf_dir: Path = Path("/etc/cni/net.d")
    bin_dirs: tuple[Path, ...] = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    state_dir: Path = Path("/run/ocid")
    lease_dir: Path = Path("/var/lib/cni/networks")
    netns_dir: Path | None = None  # None: netns in the state directory
    pool_size: int = 4
    plugin_timeout_s: float = 60.0
    default_name: str = "ocid"
    default_bridge: str = "ocid0"
    default_subnets: tuple[str, ...] = ("10.88.0.0/16", "10.89.0.0/16", "10.188.0.0/16", "172.31.0.0/16")
    nft_table: str = "ocid"
    interface: str = "eth0"
