"""AppArmor and SELinux of a container: names and labels for config.json, as far as this kernel has either.

Refuses, by field, what this kernel cannot do: a container that was to be confined does not run without. Who names no
AppArmor profile has the default one, where it is loaded, as with the peers. Invariant: an empty answer means that
nothing was asked for, or what a kernel without the module gives anyway (AppArmor's RuntimeDefault and Unconfined, as in
the peers).
"""

from __future__ import annotations

import re

from cri.api import api_pb2 as pb
from cri.spec import security, validate
from cri.spec.validate import InvalidRequest
from runtime import labels
from runtime.linux.dataclass import dataclass

APPARMOR_DEFAULT = "ocid-default"
_LOCALHOST = "localhost/"
_SELINUX_WORD = re.compile(r"[A-Za-z0-9_.:,-]{0,256}", re.ASCII)


def apparmor(
    field: str, context: pb.LinuxContainerSecurityContext | pb.LinuxSandboxSecurityContext, *, default: bool = False
) -> str:
    """The profile for process.apparmorProfile, "" for none; `default`: who names none has ours. Raises
    InvalidRequest."""
    kind, name = _asked(field, context, default=default)
    if kind == pb.SecurityProfile.Localhost:
        if not security.apparmor_enabled():
            raise InvalidRequest(f"{field}.apparmor: {name[:80]!r} cannot be applied: this kernel has no AppArmor")
        return validate.name(f"{field}.apparmor.localhost_ref", name)
    if kind == pb.SecurityProfile.RuntimeDefault and security.apparmor_enabled() and not context.privileged:
        return APPARMOR_DEFAULT
    return ""


def _asked(
    field: str, context: pb.LinuxContainerSecurityContext | pb.LinuxSandboxSecurityContext, *, default: bool
) -> tuple[pb.SecurityProfile.ProfileType, str]:
    """Kind and name. A kubelet says it twice, in `apparmor` and as the deprecated word; the former counts."""
    if context.HasField("apparmor"):
        if context.apparmor.profile_type not in pb.SecurityProfile.ProfileType.values():
            raise InvalidRequest(f"{field}.apparmor.profile_type: unknown value {context.apparmor.profile_type}")
        return context.apparmor.profile_type, context.apparmor.localhost_ref.removeprefix(_LOCALHOST)
    word: str = getattr(context, "apparmor_profile", "")
    if word == "unconfined" or not (word or default):
        return pb.SecurityProfile.Unconfined, ""
    if word in ("", "runtime/default"):
        return pb.SecurityProfile.RuntimeDefault, ""
    if word.startswith(_LOCALHOST):
        return pb.SecurityProfile.Localhost, word.removeprefix(_LOCALHOST)
    raise InvalidRequest(
        f"{field}.apparmor_profile: {word[:80]!r} is none of runtime/default, unconfined and localhost/NAME"
    )


@dataclass(frozen=True, slots=True)
class Labels:
    """SELinux: of the process, and of its files. "" where nothing was asked for."""

    process: str = ""
    files: str = ""


def selinux(field: str, options: pb.SELinuxOption, *, ignore: bool) -> Labels:
    """The labels that `options` describe. Without SELinux `ignore` says that they mean nothing, as in the peers; else
    they are refused. Raises InvalidRequest."""
    words = {"user": options.user, "role": options.role, "type": options.type, "level": options.level}
    if not any(words.values()):
        return Labels()
    for name, word in words.items():
        if not _SELINUX_WORD.fullmatch(word) or (name != "level" and ":" in word):
            raise InvalidRequest(f"{field}.selinux_options.{name}: {word[:80]!r} is no part of a label")
    if not labels.has_selinux():
        if ignore:
            return Labels()
        raise InvalidRequest(
            f"{field}.selinux_options: this kernel has no SELinux (runtime.without_selinux says what that means)"
        )
    user, role = options.user or "system_u", options.role or "system_r"
    level = options.level or "s0"
    return Labels(f"{user}:{role}:{options.type or 'container_t'}:{level}", f"{user}:object_r:container_file_t:{level}")
