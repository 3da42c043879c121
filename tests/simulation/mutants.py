"""Break echod on purpose, to see that the simulation finds it: `make simulate MUTANT=name`."""

from __future__ import annotations

from textwrap import dedent
from typing import TYPE_CHECKING

from harness import COMMAND

if TYPE_CHECKING:
    from collections.abc import Mapping

# Code that runs in the daemon's process before the command.
MUTANTS: Mapping[str, str] = {
    "close instead of linger": """
        from echod.connection.echo import EchoSession
        EchoSession._send_fin = lambda self: self.transport and self.transport.close()
        """,
    "last byte of a long read is dropped": """
        from echod.connection.echo import EchoSession
        def data_received(self, data):
            self.received += len(data)
            self.transport.write(data[:-1] if len(data) > 1000 else data)
        EchoSession.data_received = data_received
        """,
    "received misses a byte of a long read": """
        from echod.connection.echo import EchoSession
        echo = EchoSession.data_received
        def data_received(self, data):
            echo(self, data)
            self.received -= len(data) > 1000
        EchoSession.data_received = data_received
        """,
    "reading does not resume": """
        from echod.connection.echo import EchoSession
        resume = EchoSession.resume_writing
        EchoSession.resume_writing = lambda self: None if self.reason is None else resume(self)
        """,
    "no linger after a client's half-close": """
        from echod.connection.echo import EchoSession
        def eof_received(self):
            self.client_closed()
            self.reason = "eof"
            self.transport.abort()
        EchoSession.eof_received = eof_received
        """,
    "backlog is not emptied": """
        from echod.server.listener_task import ListenerTask
        ListenerTask.accept_rest = lambda self: self.close() or True
        """,
    "every tenth ledger line is lost": """
        from echod.server.ledger import Ledger
        is_logged = Ledger._is_logged
        def chosen(self, *arguments):
            return is_logged(self, *arguments) and self.counters.accepted % 10 != 5
        Ledger._is_logged = chosen
        """,
    "every tenth client leaks a descriptor": """
        import os
        from echod.server.ledger import Ledger
        accept = Ledger.accept
        def leak(self):
            accept(self)
            if self.counters.accepted % 10 == 5:
                os.dup(2)
        Ledger.accept = leak
        """,
    "every reload leaks a thread": """
        import threading
        from echod.daemon.reload import Reloader
        finish = Reloader._finish
        def leak(self, loaded):
            finish(self, loaded)
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        Reloader._finish = leak
        """,
    "drain cuts clients at once": """
        from echod.server.drain import Drain
        run = Drain.run
        Drain.run = lambda self, shutdown: run(self, shutdown.model_copy(update={"drain_timeout": 0.0}))
        """,
    "drain closes clients that are not silent": """
        from echod.server.drain import Drain
        close_quiet = Drain.close_quiet
        Drain.close_quiet = lambda self, now, quiet_period: close_quiet(self, now, 0.0)
        """,
    "receipt misses clients from the backlog": """
        from echod.server import server
        class Receipt(server.Receipt):
            @classmethod
            def between(cls, before, after, present, seconds):
                from dataclasses import replace
                return replace(super().between(before, after, present, seconds), clients=present)
        server.Receipt = Receipt
        """,
    "no close_notify": """
        from echod.connection.tls import TlsLayer
        TlsLayer.close_notify = lambda self: None
        """,
    "a reload keeps the old certificate": """
        from echod.server.server import Server
        reconfigure = Server.reconfigure
        Server.reconfigure = lambda self, new: reconfigure(self, new._replace(tls=self.settings.tls))
        """,
    "SIGHUP does not reopen the log": """
        from echod.daemon.logs import Log
        Log.reopen = lambda self: None
        """,
}


def module(mutant: str | None) -> tuple[str, ...]:
    """Return the options of the interpreter that run the command, or a mutant of it."""
    if mutant is None:
        return COMMAND
    return ("-c", f"{dedent(MUTANTS[mutant])}\nimport sys\nfrom echod.cli import main\nsys.exit(main())")
