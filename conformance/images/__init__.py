"""Images made of Debian packages, as OCI layouts, and a way to put them into a registry.

Nothing is built by running it: package contents are read as archives and written as layers with fixed times and
owners, so that the same packages give the same digests. The network is used for `apt-get download` alone.
"""

from conformance.images.recipes import BUSYBOX, NAMES, layouts
from conformance.images.registry_push import push

__all__ = ["BUSYBOX", "NAMES", "layouts", "push"]
