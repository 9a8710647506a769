"""config.json's hooks as frozen values: what the operator wants run, and at which points of a container's life.

Refuses relative paths and timeouts that are none. Invariant: `Hook.where` is how runc names it in errors, such as
"createRuntime hook #0".
"""

from __future__ import annotations

from runtime.linux.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from runtime.fields import Fields


# Field of `Hooks`: its key in config.json.
HOOKS = {
    "prestart": "prestart",
    "create_runtime": "createRuntime",
    "create_container": "createContainer",
    "start_container": "startContainer",
    "poststart": "poststart",
    "poststop": "poststop",
}


class Hook(Record):
    """A program of the operator that runs at a point of the lifecycle; `timeout` in seconds, 0: none. `env` None: the
    environment of where it runs."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...] | None
    timeout: int
    where: str


class Hooks(Record):
    """config.json's hooks; `prestart` runs just before `create_runtime` (deprecated, but in use)."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


def parse_hooks(fields: Fields) -> Hooks:
    """The hooks of a whole config.json. Raises FieldError."""
    hooks = fields.object("hooks")
    if hooks is None:
        return Hooks()
    return Hooks(
        **{
            name: tuple(_hook(entry, f"{key} hook #{index}") for index, entry in enumerate(hooks.objects(key)))
            for name, key in HOOKS.items()
        }
    )


def _hook(fields: Fields, where: str) -> Hook:
    path = fields.str("path", required=True)
    if not path.startswith("/"):
        raise fields.error("path", f'expected an absolute path, got "{path:.80}"')
    timeout = fields.optional_int("timeout")
    if timeout is not None and timeout <= 0:
        raise fields.error("timeout", f"expected more than zero seconds, got {timeout}")
    env = fields.strs("env") if fields.has("env") else None
    return Hook(path, fields.strs("args"), env, timeout or 0, where)


def to_json(hooks: Iterable[Hook]) -> list[dict[str, object]]:
    """What `parse_hooks` takes for one kind."""
    found = []
    for hook in hooks:
        entry: dict[str, object] = {"path": hook.path, "args": hook.args, "timeout": hook.timeout or None}
        found.append(entry if hook.env is None else {**entry, "env": hook.env})
    return found
