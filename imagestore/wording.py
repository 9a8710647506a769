"""What a message may repeat of what a registry said: one line, short, printable, without a secret.

Pure. Refuses to quote a URL beyond its host: paths and queries of signed URLs are credentials (threats S30).
Invariant: no text that passed `quote` holds one of `secrets`, even when the registry sent it back to us.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#\"'<>]*@)?([^\s/?#\"'<>]*)[^\s\"'<>]*")
_SCHEMES = re.compile(r"\b(Basic|Bearer)\s+\S+", re.IGNORECASE)
_LIMIT = 240


def quote(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` as it may stand in an error."""
    text = text[: 64 << 10]
    for secret in sorted((secret for secret in secrets if secret), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _SCHEMES.sub(r"\1 ***", _URL.sub(r"\1\2/…", text))
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"


def registry_words(body: bytes, secrets: Iterable[str] = ()) -> str:
    """The first error of a registry's error body (distribution-spec, "errors"), or "" when it has none to quote."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(document, dict):
        return ""
    errors = document.get("errors")
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        first = errors[0]
        words = first.get("message") or first.get("code")
    else:
        words = document.get("details") or document.get("error_description") or document.get("message")
    return quote(words, secrets) if isinstance(words, str) else ""
