"""Handle exceptions that reach the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from echod.connection.echo import EchoSession

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def report(context: dict[str, Any], logger: FilteringBoundLogger) -> None:
    """Give an exception to the session that it concerns, and log every other one.

    Args:
        context: as in `loop.call_exception_handler`.
        logger: of the process.

    """
    protocol, error = context.get("protocol"), context.get("exception")
    # A protocol in front of the session, such as the TLS layer, has it as an attribute.
    session = getattr(protocol, "session", protocol)
    if isinstance(session, EchoSession) and isinstance(error, Exception) and not session.ended.done():
        session.fail(error)  # raised by the client's task, and logged there
    else:
        logger.error("loop_error", message=context["message"], exc_info=error)
