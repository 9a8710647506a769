"""How an exec or attach ended, as clients read it on the error stream: metav1.Status, or bare words before v4.

No I/O. Invariant: an exit code is told as a number where the client can read one, never only in a sentence.
"""

from __future__ import annotations

import json

from runtime.linux.dataclass import dataclass

_EXIT_REASON = "NonZeroExitCode"
_INTERNAL = "InternalError"


@dataclass(frozen=True, slots=True)
class Status:
    """The end of a session: an exit code, or a sentence about why there is none."""

    exit_code: int = 0
    failure: str = ""

    def as_json(self) -> bytes:
        """metav1.Status, for protocols from v4 on."""
        status: dict[str, object] = {"metadata": {}, "status": "Failure", "message": self.words()}
        if self.failure:
            status |= {"reason": _INTERNAL, "details": {"causes": [{"message": self.failure}]}, "code": 500}
        elif self.exit_code:
            causes = [{"reason": "ExitCode", "message": str(self.exit_code)}]
            status |= {"reason": _EXIT_REASON, "details": {"causes": causes}}
        else:
            status = {"metadata": {}, "status": "Success"}
        return json.dumps(status).encode()

    def as_text(self) -> bytes:
        """For protocols before v4: nothing when all went well."""
        return self.words().encode()

    def words(self) -> str:
        """One sentence, "" for success."""
        if self.failure:
            return f"Internal error occurred: {self.failure}"
        return f"command terminated with non-zero exit code: exit status {self.exit_code}" if self.exit_code else ""
