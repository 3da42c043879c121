"""echod: a TCP echo daemon that returns every byte and accounts for each of them (RFC 862).

Other programs use `Server`. `Entry` describes a closed connection, and `Receipt` a stop. Opening a server raises
`SettingsError` or `ListenError`. Each name is imported at its first use, so `import echod` costs nothing.
"""

__version__ = "0.1.0"

__all__ = ["Entry", "ListenError", "Receipt", "Server", "SettingsError", "TcpAddress", "UnixAddress"]

TYPE_CHECKING = False  # importing the constant from typing would cost time

if TYPE_CHECKING:
    from echod.embed import Server
    from echod.net.addresses import TcpAddress, UnixAddress
    from echod.net.listeners import ListenError
    from echod.server.ledger import Entry
    from echod.server.receipt import Receipt
    from echod.settings.problems import SettingsError
else:
    _MODULES = {
        "Entry": "server.ledger",
        "ListenError": "net.listeners",
        "Receipt": "server.receipt",
        "Server": "embed",
        "SettingsError": "settings.problems",
        "TcpAddress": "net.addresses",
        "UnixAddress": "net.addresses",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        from importlib import import_module  # noqa: PLC0415

        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
