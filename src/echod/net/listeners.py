"""From addresses to sockets that listen: all of them, or none; inherited ones among them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from echod.net import resolver
from echod.net.addresses import Address, AddressError, InheritedAddress, TcpAddress, UnixAddress, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

# Tries to find a port that is free in both families.
_PORT_TRIES = 20

# The first descriptor that is passed on, SD_LISTEN_FDS_START of sd_listen_fds(3).
_FIRST_INHERITED = 3

_PROBE_TIMEOUT = 1.0

# For the lock of a folder, seconds. It is waited for by trying again: whoever may read the folder may lock it for good.
_LOCK_TIMEOUT = 2.0
_LOCK_RETRY = 0.02


class ListenError(Exception):
    """Some addresses could not be opened; `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ListeningSocket:
    """A socket that listens, and what its end has to see to.

    Args:
        sock: listening and non-blocking.
        path: the file of a unix socket, to be removed when it is withdrawn.
        inherited: whether somebody else holds it too, for whom its queue is kept.

    """

    def __init__(self, sock: socket.socket, path: Path | None = None, *, inherited: bool = False) -> None:
        self.sock = sock
        self.inherited = inherited
        # A unix socket's connections take over no option, and those in an inherited queue may be older than the option.
        self._set_inline = inherited or sock.family == socket.AF_UNIX
        self._path = path
        self._node = None if path is None else _node(path)

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection whose urgent data is read in its place (RFC 6093), and return it with the peer's address.

        Raises:
            OSError: of accept(2).

        """
        connection, sockaddr = self.sock.accept()
        if self._set_inline:
            with contextlib.suppress(OSError):  # EOPNOTSUPP of MPTCP, which has no urgent data
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        return connection, sockaddr

    def withdraw(self) -> None:
        """Let nobody else find it, where that can be had without closing it. Idempotent."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                # Another process may have put its own in this place since.
                if _node(self._path) == self._node:
                    self._path.unlink()
            self._path = None

    def close(self) -> None:
        """Withdraw it and close it; of an inherited one only this process's hold on it."""
        self.withdraw()
        with contextlib.suppress(OSError):  # the kernel has closed it, whatever it reports: close(2)
            self.sock.close()


class Listener(NamedTuple):
    """A listener's name and its sockets, one for each address its host stands for."""

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
) -> list[Listener]:
    """Bind and listen on every address.

    The sockets are non-blocking. Those of TCP have SO_REUSEADDR, SO_KEEPALIVE, SO_OOBINLINE and TCP_NODELAY; the
    connections that they accept inherit these.

    Args:
        specs: names and addresses.
        backlog: of each socket; the kernel cuts it down to net.core.somaxconn. Whoever opened an inherited one has
            chosen its own.
        inherited: the inherited sockets, by their names.
        stopped: called while a name is resolved; True ends the wait.

    Raises:
        InterruptedError: `stopped` returned True; all sockets are closed again.
        ListenError: one or more could not be opened; those that could are closed again.

    """
    problems: list[str] = []
    with contextlib.ExitStack() as opened:
        listeners: list[Listener] = []
        for name, address, socket_mode in specs:
            try:
                match address:
                    case TcpAddress():
                        sockets = _open(address, backlog, stopped)
                    case UnixAddress():
                        sockets = [_open_unix(address, backlog, socket_mode)]
                    case _:
                        sockets = list(_adopt(address, inherited or {}))
            except InterruptedError:
                raise
            except OSError as error:
                problems.append(f"cannot listen on {address}: {_explain(error)}")
                continue
            for listening in sockets:
                opened.callback(listening.close)
            listeners.append(Listener(name, sockets))
        if problems:
            raise ListenError(problems)
        opened.pop_all()
        return listeners


def inherit() -> dict[str, list[socket.socket]]:
    """Take over the sockets that whoever started this process passed on, by name: sd_listen_fds_with_names(3).

    The variables LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES are removed, since they are meant for this process alone.

    Raises:
        ListenError: what was passed on is no listening stream socket, or the variables contradict each other.

    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", None) for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or count is None:
        return {}
    if not (count.isascii() and count.isdecimal() and len(count) <= 5):
        raise ListenError([f"LISTEN_FDS should be a number, not {count!r}"])
    labels = names.split(":") if names is not None else ["unknown"] * int(count)
    if len(labels) != int(count):
        raise ListenError([f"LISTEN_FDNAMES has {len(labels)} names for {count} sockets: {names}"])
    sockets: dict[str, list[socket.socket]] = {}
    problems: list[str] = []
    for descriptor, label in enumerate(labels, _FIRST_INHERITED):
        try:
            parse(f"systemd:{label}")
        except AddressError:
            problems.append(f"inherited descriptor {descriptor}: {label!r} is no name")
            continue
        try:
            os.set_inheritable(descriptor, False)  # noqa: FBT003  (its parameter is positional)
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            problems.append(f"inherited descriptor {descriptor}, {label!r}: {_explain(error)}")
            continue
        sockets.setdefault(label, []).append(sock)
        kind = sock.type
        if kind != socket.SOCK_STREAM:
            problems.append(f"inherited descriptor {descriptor}, {label!r}, is a {kind.name} socket, not SOCK_STREAM")
        elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            problems.append(f"inherited descriptor {descriptor}, {label!r}, does not listen")
    if problems:
        raise ListenError(problems)
    return sockets


def _explain(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    return error.strerror or str(error)


def _adopt(address: InheritedAddress, inherited: Mapping[str, Sequence[socket.socket]]) -> Iterator[ListeningSocket]:
    if address.name not in inherited:
        names = ", ".join(inherited) or "none"
        msg = f"no socket of that name was inherited; there are: {names}"
        raise OSError(msg)
    for sock in inherited[address.name]:
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        if sock.family != socket.AF_UNIX:
            _set_tcp_options(sock)
        yield ListeningSocket(sock, inherited=True)


def _open(address: TcpAddress, backlog: int, stopped: Callable[[], bool]) -> list[ListeningSocket]:
    found = resolver.resolve(address.host, address.port, flags=socket.AI_PASSIVE, stopped=stopped)
    # Some resolvers name an address twice, and IPv4 goes first whatever their order: one order on every host.
    infos = sorted(dict.fromkeys(found), key=lambda info: info[0] == socket.AF_INET6)
    tries = 1 if address.port else _PORT_TRIES
    while True:
        try:
            return [ListeningSocket(sock) for sock in _open_once(infos, address.port, backlog)]
        except OSError as error:
            # The port that the kernel chose for the first family may be taken in the second.
            tries -= 1
            if error.errno != errno.EADDRINUSE or not tries:
                raise


def _open_once(infos: resolver.Found, port: int, backlog: int) -> list[socket.socket]:
    """Open one socket for each IP address of the host, all on one port."""
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, _, _, _, sockaddr in infos:
            try:
                sock = _bind(family, (sockaddr[0], port, *sockaddr[2:]), backlog)
            except OSError as error:
                # A host without IPv6 still has names with IPv6 addresses, localhost to begin with.
                if not sockets or family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                    raise
                continue
            opened.enter_context(sock)
            port = sock.getsockname()[1]
            sockets.append(sock)
        opened.pop_all()
        return sockets


def _bind(family: int, sockaddr: tuple[str | int, ...] | str, backlog: int) -> socket.socket:
    with contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)  # noqa: FBT003  (its only parameter)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            _set_tcp_options(sock)
        if family == socket.AF_INET6:
            # Each family has a socket of its own, so that a port is taken, or found free, in both.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(backlog)
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
        # The file is to have its mode from the first moment on. Nothing else makes files now: the umask is the process's.
        mask = os.umask(~mode & 0o777)
        try:
            sock = _bind(socket.AF_UNIX, address.sockaddr, backlog)
        finally:
            os.umask(mask)
        return ListeningSocket(sock, path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that of two processes that start together, none takes the other's socket for stale.

    A socket that is bound, and does not listen yet, refuses connections as one does whose process has died.

    Raises:
        OSError: somebody has held it for long: not one of ours.

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
    """Remove a unix socket that nobody listens on any more, if there is one.

    Raises:
        OSError: somebody does, or the path is no socket: it is not touched then.

    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        msg = "the file exists and is no socket"
        raise OSError(msg)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT)  # the connect of a full backlog would wait
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError:
            pass  # alive, or not for us to tell: a full backlog, another type of socket, no permission
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _node(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
