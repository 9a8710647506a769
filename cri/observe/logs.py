"""Log lines as JSON, one object a line, with what they are about: pod and container, trace and span.

Refuses a second line: whatever a message or a traceback holds stays inside its object. Invariant: a record that cannot
be formatted is still told, with the reason, so that no line is lost.
"""

from __future__ import annotations

import json
import logging
import time

from cri import trace

_LEVELS = {"WARNING": "warn", "CRITICAL": "fatal"}


class JsonFormatter(logging.Formatter):
    """{"time": …, "level": …, "msg": …, "logger": …, "pod": …, "container": …, "trace_id": …, "error": …}"""

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception as error:
            message = f"{record.msg!r}: cannot be formatted: {error}"
        found: dict[str, object] = {
            "time": _moment(record.created),
            "level": _LEVELS.get(record.levelname, record.levelname.lower()),
            "msg": message,
            "logger": record.name,
            **trace.subject(),
        }
        tracer = trace.tracer()
        if tracer is not None:
            trace_id, span_id = tracer.ids()
            if trace_id:
                found |= {"trace_id": trace_id, "span_id": span_id}
        if record.exc_info:
            found["error"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()


def _moment(seconds: float) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{date}.{int(seconds % 1 * 1e6):06}Z"
