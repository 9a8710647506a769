"""The repositories that a reference leads to: hosts from hosts.toml or registries.conf, each with what it may be sent.

Refuses registries that registries.conf blocks, whatever hosts.toml says of them. Invariant: what a caller gave goes to
the registry that the reference names and to nobody else; what lies on this machine goes to the host that its entry
names (threats R9, S27).
"""

from __future__ import annotations

from imagestore.auth import applicable
from imagestore.config import StoreConfig
from imagestore.errands import Errand
from imagestore.host_files import with_certificates
from imagestore.hosts import Host, configured, unverified, upstream_host
from imagestore.keyring import Keyring
from imagestore.model import Credentials, ImageNotFound
from imagestore.rate import Rate
from imagestore.reference import Reference, is_qualified, parse
from imagestore.registries_conf import RegistriesFiles
from imagestore.registry import Repository
from imagestore.threads import Threads
from imagestore.transport import Transport


class Remotes:
    """What one store or one copy knows of registries."""

    def __init__(self, transport: Transport, threads: Threads, config: StoreConfig, *, verify: bool = True) -> None:
        """Without `verify`, which somebody must have said, the registry itself need not prove who it is."""
        self._verify = verify
        self._transport = transport
        self._threads = threads
        self._config = config
        self._keyring = Keyring(config.keyring)
        self._files = RegistriesFiles(config.registries_conf)

    def candidates(self, text: str) -> tuple[Reference, ...]:
        """What `text` may mean, in the order in which to try. Blocks. Raises ReferenceInvalid, ImageError."""
        if is_qualified(text):  # no file says otherwise, and this is asked for each container
            return (parse(text),)
        return self._files.now().candidates(text)

    async def repositories(
        self, wanted: Reference, credentials: Credentials | None, actions: str = "pull"
    ) -> list[Repository]:
        """In the order in which to ask; the registry itself comes last. Raises ImageError and its kinds."""
        found = await self._threads.ask(self._hosts, wanted, credentials)
        limit = self._config.pull_bandwidth_bytes
        rate = Rate(limit) if limit else None
        return [
            Repository(host, wanted, logins, self._transport, self._threads, self._config, actions, rate)
            for host, logins in found
        ]

    async def repository(self, wanted: Reference, credentials: Credentials | None, actions: str) -> Repository:
        """The one that `actions` are for: the registry itself; for pushes the first host that the files let push to.
        Where it may be spoken to in two ways, the one that it answers to. Raises ImageError and its kinds."""
        found = await self.repositories(wanted, credentials, actions)
        pushing = "push" in actions
        able = [one for one in found if one.host.push] if pushing else found
        if not able:
            raise ImageNotFound(f"no host of {wanted.domain} in hosts.toml may be pushed to")
        chosen = able[0 if pushing else -1]
        same = [one for one in able if one is chosen or one.host.is_twin(chosen.host)]
        for one in same if len(same) > 1 else ():
            if await one.answers():
                return one
        return chosen

    def _hosts(
        self, wanted: Reference, given: Credentials | None, errand: Errand
    ) -> list[tuple[Host, tuple[Credentials, ...]]]:
        config = self._config
        listed = self._files.now().hosts(wanted)  # first of all: it may say that the registry is blocked
        hosts = configured(wanted.domain, config.hosts_directories, config.mirrors)
        if hosts is None:
            named = listed or (upstream_host(wanted.domain),)
            hosts = with_certificates(named, wanted.domain, config.hosts_directories)
        if not self._verify:
            hosts = tuple(made for host in hosts for made in (unverified(host) if host.upstream else (host,)))
            hosts = tuple(dict.fromkeys(hosts))  # as registries.conf may have said already
        return [(host, self._logins(host, wanted, applicable(given, wanted.domain), errand)) for host in hosts]

    def _logins(
        self, host: Host, wanted: Reference, given: Credentials | None, errand: Errand
    ) -> tuple[Credentials, ...]:
        if host.upstream and given is not None:
            return (given,)
        # A registry that a file has moved elsewhere is logged in to under the name that it has there.
        moved = bool(host.path) or not host.upstream
        domain = host.origin.partition("://")[2] if moved else wanted.domain
        path, helpers = host.repository(wanted.path) if moved else wanted.path, self._files.now().helpers
        found = self._keyring.find(domain, path, errand, helpers)
        return (found, Credentials()) if found is not None else ()
