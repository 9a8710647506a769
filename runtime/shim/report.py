"""shim.log: what went wrong in a shim or a helper, where nobody could be told of it.

Refuses to grow it beyond a limit, and to fail. Invariant: an entry is one line.
"""

from __future__ import annotations

import os

_LOG_LIMIT = 1 << 20


def report(what: str, error: BaseException) -> None:
    """One entry in shim.log (our stderr): what went wrong and where, as far as there is room."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    text = f"{what}: {type(error).__name__}: {error} ({' '.join(places)})\n"
    try:
        if os.fstat(2).st_size < _LOG_LIMIT:
            os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass
