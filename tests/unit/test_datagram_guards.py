"""The guards: which datagrams get no answer, and for which cause."""

from __future__ import annotations

import pytest

from echod.datagram.guards import Guards, OwnAddresses, source_of
from echod.datagram.server import is_local
from echod.net.addresses import network

pytestmark = pytest.mark.once

OWN = OwnAddresses(
    [("127.0.0.1", 7007), ("::1", 7007), ("0.0.0.0", 7008), ("::", 7009)], lambda host: host in {"127.0.0.9", "::1"}
)
GUARDS = Guards(frozenset({7, 2049}), tuple(map(network, ("127.0.0.0/8", "::1", "fe80::/10"))), OWN)
EVERYONE = Guards(frozenset(), (), OWN)


@pytest.mark.parametrize(
    ("host", "port", "local", "cause"),
    [
        ("127.0.0.2", 5000, "127.0.0.1", None),
        ("::1", 5000, "::1", None),
        ("fe80::1%lo", 5000, "fe80::2", None),
        ("224.0.0.1", 5000, "127.0.0.1", "multicast"),
        ("239.255.255.255", 5000, "127.0.0.1", "multicast"),
        ("255.255.255.255", 5000, "127.0.0.1", "multicast"),
        ("255.1.2.3", 5000, "127.0.0.1", "multicast"),
        ("0.0.0.0", 5000, "127.0.0.1", "multicast"),
        ("0.1.2.3", 5000, "127.0.0.1", "multicast"),
        ("ff02::1", 5000, "::1", "multicast"),
        ("::", 5000, "::1", "multicast"),
        ("::ffff:127.0.0.2", 5000, "::1", "multicast"),
        ("127.0.0.2", 5000, "224.0.0.1", "multicast"),
        ("127.0.0.2", 5000, "255.255.255.255", "multicast"),
        ("::1", 5000, "ff02::1", "multicast"),
        ("224.0.0.1", 7, "127.0.0.1", "multicast"),
        ("127.0.0.2", 7, "127.0.0.1", "port"),
        ("10.0.0.1", 2049, "127.0.0.1", "port"),
        ("127.0.0.1", 7007, "127.0.0.1", "self"),
        ("::1", 7007, "::1", "self"),
        ("127.0.0.2", 7007, "127.0.0.1", None),
        ("127.0.0.9", 7008, "127.0.0.1", "self"),
        ("127.0.0.8", 7008, "127.0.0.1", None),
        ("::1", 7009, "::1", "self"),
        ("127.0.0.9", 7009, "127.0.0.1", "self"),
        ("10.0.0.1", 5000, "127.0.0.1", "network"),
        ("2001:db8::1", 5000, "::1", "network"),
    ],
)
def test_refusal(host: str, port: int, local: str, cause: str | None) -> None:
    """Each rule has its cause. If several apply, the first in the documented order counts."""
    assert GUARDS.refusal(host, port, local) == cause


def test_everyone() -> None:
    """Without refused ports and networks, the other rules remain."""
    assert EVERYONE.refusal("192.0.2.1", 7, "127.0.0.1") is None
    assert EVERYONE.refusal("127.0.0.1", 7007, "127.0.0.1") == "self"
    assert EVERYONE.refusal("224.0.0.1", 5000, "127.0.0.1") == "multicast"


def test_source() -> None:
    """IPv6 hosts of a /64 network share a bucket, except those with link-local addresses."""
    assert source_of("192.0.2.1") == "192.0.2.1"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:0:0:2")
    assert source_of("2001:db8::1") != source_of("2001:db8:0:1::1")
    assert source_of("fe80::1%eth0") != source_of("fe80::2%eth0")


def test_is_local() -> None:
    """The kernel tells which addresses are local, for both families."""
    assert is_local("127.0.0.9")
    assert is_local("::1")
    assert not is_local("192.0.2.1")
    assert not is_local("2001:db8::1")
