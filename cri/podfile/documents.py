"""YAML text as objects of JSON's kinds: what `ocid pod play` reads. The only place that imports a YAML parser.

Refuses aliases (a few lines of them can stand for terabytes), tags, keys that come twice or are no text, and more
than MAX_BYTES or MAX_DOCUMENTS. Invariant: what is returned holds dicts, lists, texts, numbers, truths and None, and
nothing else; documents that are empty are not there.
"""

from __future__ import annotations

from typing import Any

import yaml

from runtime.fields import FieldError

MAX_BYTES = 1 << 20
MAX_DOCUMENTS = 100
MAX_DEPTH = 50
_KINDS = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as kubectl reads it, without what its documents have no use for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are refused", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r:.40} is no text", key_node.start_mark)
            if key in found:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r:.40} twice", key_node.start_mark)
            found.add(key)
        return super().construct_mapping(node, deep)


# A date is text here, as it is in JSON.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def documents(raw: bytes, what: str) -> list[Any]:
    """The documents in `raw`, in their order. Raises FieldError."""
    if len(raw) > MAX_BYTES:
        raise FieldError(what, f"{len(raw)} bytes or more, at most {MAX_BYTES} are read")
    try:
        found: list[Any] = []
        for document in yaml.load_all(raw.decode("utf-8"), _Loader):
            if len(found) == MAX_DOCUMENTS:
                raise FieldError(what, f"more than {MAX_DOCUMENTS} documents")
            if document is not None:
                _check(document, what, 0)
                found.append(document)
        return found
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise FieldError(what, f"no valid YAML: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise FieldError(what, f"no valid YAML: {error}") from None
    except RecursionError:
        raise FieldError(what, "nested too deeply") from None


def _check(value: Any, what: str, depth: int) -> None:
    """Nothing that only YAML has, such as sets and bytes."""
    if depth > MAX_DEPTH:
        raise FieldError(what, "nested too deeply")
    if isinstance(value, dict):
        for item in value.values():
            _check(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, what, depth + 1)
    elif not isinstance(value, _KINDS):
        raise FieldError(what, f"no valid YAML: a {type(value).__name__} is no value of Kubernetes")
