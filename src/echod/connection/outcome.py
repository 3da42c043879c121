"""The reasons for the end of a connection, and the meaning of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

Reason = Literal[
    "eof",
    "undelivered",
    "reset",
    "idle",
    "stalled",
    "handshake",
    "tls",
    "proxy_header",
    "client_limit",
    "not_allowed",
    "line_too_long",
    "info",
    "quiet",
    "cut",
    "aborted",
    "fault",
    "io_error",
    "failed",
]

Outcome = Literal["completed", "quiet", "cut", "aborted", "failed"]


class Meaning(NamedTuple):
    """The meaning of a reason."""

    outcome: Outcome
    """The field of the receipt that counts it."""
    peer_to_blame: bool
    always_logged: bool
    """Whether `log.connections = "nonempty"` logs it even if the client sent nothing."""
    is_failure: bool = True
    """Whether `log.connections = "failed"` logs it even if the client got all of its echo."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing has gone wrong so far. A later error replaces such a reason."""
        return not self.peer_to_blame and self.outcome in {"completed", "quiet", "cut"}


MEANINGS: Mapping[Reason, Meaning] = {
    "eof": Meaning("completed", peer_to_blame=False, always_logged=False, is_failure=False),
    "undelivered": Meaning("aborted", peer_to_blame=True, always_logged=False),
    "reset": Meaning("completed", peer_to_blame=True, always_logged=False),
    "idle": Meaning("quiet", peer_to_blame=False, always_logged=False),
    "stalled": Meaning("aborted", peer_to_blame=True, always_logged=False),
    "handshake": Meaning("failed", peer_to_blame=True, always_logged=True),
    "tls": Meaning("failed", peer_to_blame=True, always_logged=True),
    "proxy_header": Meaning("failed", peer_to_blame=True, always_logged=True),
    "client_limit": Meaning("failed", peer_to_blame=True, always_logged=True),
    "not_allowed": Meaning("failed", peer_to_blame=True, always_logged=True),
    "line_too_long": Meaning("failed", peer_to_blame=True, always_logged=False),
    "info": Meaning("completed", peer_to_blame=False, always_logged=True, is_failure=False),
    "quiet": Meaning("quiet", peer_to_blame=False, always_logged=False, is_failure=False),
    "cut": Meaning("cut", peer_to_blame=False, always_logged=False),
    "aborted": Meaning("aborted", peer_to_blame=False, always_logged=False),
    "fault": Meaning("failed", peer_to_blame=False, always_logged=False),
    "io_error": Meaning("failed", peer_to_blame=False, always_logged=True),
    "failed": Meaning("failed", peer_to_blame=False, always_logged=True),
}


def has_failed(reason: Reason, received: int, acked: int) -> bool:
    """Tell whether a connection ended badly: by its reason, or because the client did not get all of its echo."""
    return MEANINGS[reason].is_failure or acked < received
