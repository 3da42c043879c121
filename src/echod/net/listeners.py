"""Open listening sockets: all of them, or none."""

from __future__ import annotations

import _socket
import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from echod.net import resolver
from echod.net.addresses import Address, InheritedAddress, TcpAddress, UdpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ReusePort = Literal["never", "before_bind", "after_bind"]

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

# Receive buffer of a UDP socket, bytes. The kernel caps it at net.core.rmem_max. It bridges pauses of the process.
_DATAGRAM_BUFFER = 4 * 1024 * 1024

# Tries to find a port that is free in both families.
_PORT_TRIES = 20

_PROBE_TIMEOUT = 1.0

# Seconds to wait for the lock of a folder. Any process that may read the folder can hold it for ever, so flock(2) must not
# block.
_LOCK_TIMEOUT = 2.0
_LOCK_RETRY = 0.02


class ListenError(Exception):
    """Some addresses could not be opened. `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class _Connection(socket.socket):
    """An accepted socket. Its family and type are integers.

    `socket.socket` makes an enum member each time that one of them is read, and uvloop reads them for each connection. It
    needs a subclass of `socket.socket`: it would close the descriptor of a plain `_socket.socket` twice.
    """

    __slots__ = ()

    family = _socket.socket.family  # type: ignore[assignment]  # instead of an enum member
    type = _socket.socket.type  # type: ignore[assignment]


class ListeningSocket:
    """A listening socket or a UDP socket. For a unix socket, also its file.

    Args:
        sock: listening and non-blocking, or a non-blocking UDP socket, which has nothing to accept.
        path: the file of a unix socket that was bound here.
        inherited: whether the service manager holds it too. Its queue is left to the next process then.

    """

    def __init__(self, sock: socket.socket, path: Path | None = None, *, inherited: bool = False) -> None:
        self.sock = sock
        self.inherited = inherited
        # A unix socket's connections inherit no option, and those in an inherited queue may be older than the option.
        self._set_inline = inherited or sock.family == socket.AF_UNIX
        self._kind = int(sock.family), int(sock.type), sock.proto
        self._path = path
        self._node = None if path is None else _node(path)

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection, and return it with the peer's address. Its urgent data is read in place (RFC 6093).

        The socket is blocking until the loop has made a transport of it.

        Raises:
            OSError: accept(2) failed.

        """
        descriptor, sockaddr = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001  (half of `accept`)
        try:
            connection = _Connection(*self._kind, descriptor)
        except BaseException:  # MemoryError
            os.close(descriptor)
            raise
        if self._set_inline:
            with contextlib.suppress(OSError):  # EOPNOTSUPP of MPTCP, which has no urgent data
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        return connection, sockaddr

    def withdraw(self) -> None:
        """Unlink the socket file so that no new client finds it. Idempotent."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                # Another process may have replaced the file since.
                if _node(self._path) == self._node:
                    self._path.unlink()
            self._path = None

    def close(self) -> None:
        """Withdraw and close the socket. An inherited one stays open in the service manager."""
        self.withdraw()
        with contextlib.suppress(OSError):  # the kernel has closed it, whatever it reports: close(2)
            self.sock.close()


class Listener(NamedTuple):
    """A listener's name and its sockets, one for each IP address of its host."""

    name: str
    sockets: list[ListeningSocket]


class ListenerSpec(NamedTuple):
    """A listener to be opened."""

    name: str
    address: Address
    socket_mode: int = 0o660
    """Permissions of a unix socket's file."""


def open_listeners(
    specs: Iterable[ListenerSpec],
    backlog: int,
    inherited: Mapping[str, Sequence[socket.socket]] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    *,
    share_ports: bool = False,
) -> list[Listener]:
    """Bind every address, and listen on those of streams.

    The sockets are non-blocking. TCP sockets have SO_REUSEADDR, SO_KEEPALIVE, SO_OOBINLINE and TCP_NODELAY, which their
    connections inherit.

    Args:
        specs: names and addresses.
        backlog: of each socket; the kernel caps it at net.core.somaxconn. Inherited sockets keep their own.
        inherited: the inherited sockets by name.
        stopped: called while a name is resolved. True ends the wait.
        share_ports: whether `open_sibling` may follow.

    Raises:
        InterruptedError: `stopped` returned True. All sockets are closed again.
        ListenError: at least one address could not be opened. The other sockets are closed again.

    """
    problems: list[str] = []
    with contextlib.ExitStack() as opened:
        listeners: list[Listener] = []
        for name, address, socket_mode in specs:
            try:
                match address:
                    case TcpAddress():
                        sockets = _open(address, backlog, stopped, "after_bind" if share_ports else "never")
                    case UdpAddress():
                        sockets = _open(address, backlog, stopped, "never")
                    case UnixAddress():
                        sockets = [_open_unix(address, backlog, socket_mode)]
                    case _:
                        sockets = list(_adopt(address, inherited or {}))
            except InterruptedError:
                raise
            except OSError as error:
                from echod.net import listen_errors  # noqa: PLC0415  (needed for errors only)

                own = _describe(listeners, inherited or {})
                problems.append(f"cannot listen on {address}: {listen_errors.explain(error, address, own)}")
                continue
            for listening in sockets:
                opened.callback(listening.close)
            listeners.append(Listener(name, sockets))
        if problems:
            raise ListenError(problems)
        opened.pop_all()
        return listeners


def _describe(
    listeners: Iterable[Listener], inherited: Mapping[str, Sequence[socket.socket]]
) -> Iterator[tuple[str, socket.socket]]:
    """Yield every listening socket of this process, with a description for messages."""
    for name, sockets in inherited.items():
        yield from ((f"the inherited socket {name!r}", sock) for sock in sockets)
    for name, opened in listeners:
        yield from ((f"the listener {name!r}", listening.sock) for listening in opened)


def _adopt(address: InheritedAddress, inherited: Mapping[str, Sequence[socket.socket]]) -> Iterator[ListeningSocket]:
    if address.name not in inherited:
        names = ", ".join(inherited) or "none"
        msg = f"no socket of that name was inherited; inherited names: {names}"
        raise OSError(msg)
    kind = socket.SOCK_DGRAM if address.datagram else socket.SOCK_STREAM
    sockets = [sock for sock in inherited[address.name] if sock.type == kind]
    if not sockets:
        other = InheritedAddress(address.name, not address.datagram)
        wanted, found = ("UDP", "stream") if address.datagram else ("stream", "UDP")
        msg = f"no {wanted} socket of that name was inherited, only {found} sockets: write {other} for these"
        raise OSError(msg)
    for sock in sockets:
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        if not address.datagram and sock.family != socket.AF_UNIX:
            _set_tcp_options(sock)
        yield ListeningSocket(sock, inherited=True)


def open_sibling(listening: ListeningSocket, backlog: int) -> ListeningSocket:
    """Return another socket with a queue of its own at the same TCP address. The kernel distributes new connections.

    Args:
        listening: opened with `share_ports`.
        backlog: of the new socket.

    Raises:
        OSError: the socket cannot be opened.

    """
    name = listening.sock.getsockname()
    return ListeningSocket(_bind(listening.sock.family, name, backlog, "before_bind"))


def _open(
    address: TcpAddress | UdpAddress, backlog: int, stopped: Callable[[], bool], reuse_port: ReusePort
) -> list[ListeningSocket]:
    resolved = resolver.resolve(address.host, address.port, flags=socket.AI_PASSIVE, stopped=stopped)
    # Some resolvers return an address twice. IPv4 goes first, so that the order is the same on every host.
    infos = sorted(dict.fromkeys(resolved), key=lambda info: info[0] == socket.AF_INET6)
    tries = 1 if address.port else _PORT_TRIES
    while True:
        try:
            return [ListeningSocket(sock) for sock in _open_once(infos, address, backlog, reuse_port)]
        except OSError as error:
            # The port that the kernel chose for the first family may be taken in the second.
            tries -= 1
            if error.errno != errno.EADDRINUSE or not tries:
                raise


def _open_once(
    infos: resolver.Found, address: TcpAddress | UdpAddress, backlog: int, reuse_port: ReusePort
) -> list[socket.socket]:
    """Open one socket for each IP address of the host, all on one port."""
    port = address.port
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, _, _, _, sockaddr in infos:
            try:
                target = (sockaddr[0], port, *sockaddr[2:])
                if isinstance(address, UdpAddress):
                    sock = _bind_datagram(family, target)
                else:
                    sock = _bind(family, target, backlog, reuse_port)
            except OSError as error:
                # On a host without IPv6, names such as localhost still have IPv6 addresses.
                if not sockets or family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                    raise
                continue
            opened.enter_context(sock)
            port = sock.getsockname()[1]
            sockets.append(sock)
        opened.pop_all()
        return sockets


def _bind(
    family: int,
    sockaddr: tuple[str | int, ...] | str,
    backlog: int,
    reuse_port: ReusePort = "never",
) -> socket.socket:
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            _set_tcp_options(sock)
        if family == socket.AF_INET6:
            # Each family has its own socket, so that a port is either free or taken in both.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port == "before_bind":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(sockaddr)
        if reuse_port == "after_bind":
            # bind(2) without the option fails if another process has the port, even one with the option.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.listen(backlog)
        opened.pop_all()
        return sock


def _bind_datagram(family: int, sockaddr: tuple[str | int, ...]) -> socket.socket:
    """Return a UDP socket. SO_REUSEADDR would let another process of this user take its datagrams: socket(7)."""
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_BUFFER)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        opened.pop_all()
        return sock


def _set_tcp_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _open_unix(address: UnixAddress, backlog: int, mode: int) -> ListeningSocket:
    if address.path.startswith("@"):
        return ListeningSocket(_bind(socket.AF_UNIX, address.sockaddr, backlog))
    path = Path(address.path)
    with _locked(path.parent):
        _remove_stale(path)
        # bind(2) applies the umask, so the file has its mode at once. The umask is the process's: no other thread may
        # create files now.
        mask = os.umask(~mode & 0o777)
        try:
            sock = _bind(socket.AF_UNIX, address.sockaddr, backlog)
        finally:
            os.umask(mask)
        return ListeningSocket(sock, path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, so that two processes that start together do not remove each other's sockets as stale.

    A socket that is bound but does not listen yet refuses connections, as the socket of a dead process does.

    Raises:
        OSError: another program holds the lock.

    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_TIMEOUT
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    msg = f"another process has the folder {os.fspath(folder)!r} locked"
                    raise OSError(msg) from None
                time.sleep(_LOCK_RETRY)
                continue
            break
        yield
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove a unix socket if no process listens on it any more.

    Raises:
        OSError: a process listens on it, or the path is not a socket. The file stays.

    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        msg = "the file exists and is not a socket: remove it, or choose another path"
        raise OSError(msg)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT)  # a full backlog would block connect(2)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass  # alive, or unknown: a full backlog, another type of socket, no permission
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _node(path: Path) -> tuple[int, int]:
    node = path.lstat()
    return node.st_dev, node.st_ino
