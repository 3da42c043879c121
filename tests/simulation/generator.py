"""Generate a scenario from a seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from scenario import FAULTS, LINE_FAULTS, Listener, Scenario
from steps import (
    Await,
    AwaitEnd,
    Calm,
    Connect,
    Continue,
    Finish,
    Freeze,
    HangUp,
    Leave,
    Read,
    Reload,
    ReloadBroken,
    Rotate,
    Send,
    SendEndlessly,
    SendGarbage,
    SendUrgent,
    StopReading,
    SwapCertificate,
    Terminate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from client import Ending
    from scenario import Mode, Stop
    from steps import Header, Hello, Step

LOOPS = ("uvloop", "asyncio")

_STOPS: Sequence[Stop] = ("unhurried", "quiet", "cut", "short", "forced")
_MODES: Sequence[Mode] = ("stream", "line", "info")
_HEADERS: Sequence[Header] = ("v1", "v2")
_BAD_HEADERS: Sequence[Header] = ("garbage", "unfinished")
_HELLOS: Sequence[Hello] = ("garbage", "unfinished", "tls")
_ENDINGS: Sequence[Ending] = ("notify", "notify_fin", "fin")


def generate(seed: int) -> Scenario:
    """Return the scenario of a seed. Even seeds run on uvloop, odd ones on asyncio."""
    rng = random.Random(seed)
    listeners = _listeners(rng)
    (stop,) = rng.choices(_STOPS, (35, 25, 20, 10, 10))
    limits = _limits(rng)
    endless = stop == "cut" and "max_connections" not in limits
    steps = script(rng, listeners, limits, rng.randint(2, 9), endless=endless)
    if rng.random() < 0.4:
        steps.insert(rng.randint(0, len(steps)), Calm())
    if rng.random() < 0.7:
        steps.insert(rng.randint(len(steps) // 2, len(steps)), Terminate(rng.choice((2, 15))))
    return Scenario(
        seed=seed,
        loop=LOOPS[seed % 2],
        listeners=listeners,
        limits=limits,
        stop=stop,
        connections=rng.choices(("all", "nonempty", "failed", "none"), (85, 5, 5, 5))[0],
        steps=tuple(steps),
    )


def script(
    rng: random.Random, listeners: Sequence[Listener], limits: Mapping[str, Any], clients: int, *, endless: bool = False
) -> list[Step]:
    """Return the steps of some clients and of the operator, without a stop.

    Args:
        rng: decides.
        listeners: the clients connect to these.
        limits: those of the daemon.
        clients: their number.
        endless: whether some of them send until the daemon ends their connection.

    """
    scripts = [_client(rng, number, rng.choice(listeners), limits, endless=endless) for number in range(clients)]
    steps = _merge(rng, scripts)
    for event in _events(rng):
        steps.insert(rng.randint(0, len(steps)), event)
    if rng.random() < 0.3:
        _freeze(rng, steps)
    return steps


def _listeners(rng: random.Random) -> tuple[Listener, ...]:
    listeners = [Listener(name="plain")]
    for number in range(rng.randint(1, 3)):
        unix = rng.random() < 0.15
        (mode,) = rng.choices(_MODES, (60, 30, 10))
        fault = ""
        if mode != "info" and rng.random() < 0.35:
            suitable = sorted(LINE_FAULTS if mode == "line" else FAULTS.keys() - LINE_FAULTS)
            # A unix socket has no RST: the daemon cannot send it, nor see that a stalled client has left.
            fault = rng.choice([name for name in suitable if not (unix and name in {"resetting", "stalling"})])
        listeners.append(
            Listener(
                name=f"l{number}",
                unix=unix,
                mode=mode,
                proxy=rng.random() < 0.3,
                tls=rng.choices(("", "server", "mutual"), (55, 30, 15))[0],
                fault=fault,
            )
        )
    return tuple(listeners)


def _limits(rng: random.Random) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if rng.random() < 0.3:
        limits["write_buffer"] = rng.choice((1, 1000, 20_000, 1_000_000))
    if rng.random() < 0.3:
        limits["max_line"] = rng.choice((300, 1000))
    if rng.random() < 0.2:
        limits["max_connections"] = rng.randint(1, 4)
    if rng.random() < 0.15:
        limits["max_connections_per_client"] = 1
    if rng.random() < 0.1:
        limits["idle_timeout"] = 0.3
    if rng.random() < 0.05:
        limits["write_timeout"] = 0.3
    if rng.random() < 0.1:
        limits["handshake_timeout"] = 0.3
    return limits


def _client(
    rng: random.Random, number: int, listener: Listener, limits: Mapping[str, Any], *, endless: bool
) -> list[Step]:
    """Return the steps of one client in their order."""
    (behaviour,) = rng.choices(("well", "leaves", "bad"), (70, 20, 10))
    connect = _connect(rng, number, listener, limits, bad=behaviour == "bad")
    is_plain = (listener.mode, listener.fault) == ("stream", "")
    small = connect.read_size < 1000
    steps: list[Step] = [connect, *_traffic(rng, number, 500 if small else 5_000_000 if is_plain else 200_000)]
    if behaviour == "bad" and listener.tls:
        steps.append(SendGarbage(number))
    if behaviour == "leaves":
        if rng.random() < 0.3:
            steps.append(Finish(number, rng.choice(_ENDINGS)))
        # A stalled session does not notice a close.
        steps.append(Leave(number, by_reset=rng.random() < 0.6 or listener.fault == "stalling"))
    elif endless and is_plain and not small and rng.random() < 0.4:
        steps.append(SendEndlessly(number, rng.choice((100, 3000, 60_000))))
    elif rng.random() < 0.6:
        steps.append(Finish(number, rng.choice(_ENDINGS)))
    elif "idle_timeout" in limits:
        steps.append(AwaitEnd(number))
    return steps


def _connect(rng: random.Random, number: int, listener: Listener, limits: Mapping[str, Any], *, bad: bool) -> Connect:
    """Return the first step of a client. A bad one has a wrong PROXY header, handshake or certificate."""
    header: Header | None = None
    hello: Hello = "tls"
    certificate = True
    if listener.proxy:
        header = rng.choice(_BAD_HEADERS if bad else _HEADERS)
    elif bad:
        hello = rng.choice(_HELLOS)
        certificate = hello != "tls" or rng.random() < 0.5
    return Connect(
        number,
        listener.name,
        receive_buffer=4096 if rng.random() < 0.2 else None,
        read_size=rng.choice((1, 100, 3000)) if rng.random() < 0.2 else 65536,
        header=header,
        who=rng.randint(1, 2) if "max_connections_per_client" in limits else 1 + number % 250,
        hello=hello,
        certificate=certificate,
    )


def _traffic(rng: random.Random, number: int, unread: int) -> Iterator[Step]:
    """Yield the steps of a client between its start and its end. It leaves at most `unread` bytes of echo unread."""
    for _ in range(rng.randint(0, 4)):
        size = rng.choice((1, rng.randint(2, 200), rng.randint(200, 2000)))
        if rng.random() < 0.15 and unread > 500:
            size = rng.choice((10_000, 70_000, 300_000))
        yield Send(number, size, rng.choice((1 + size // 3, size, 65536)))
        if rng.random() < 0.1:
            yield SendUrgent(number)
        if rng.random() < 0.15:
            yield StopReading(number)
            yield Send(number, rng.choice((500, unread)), 50_000)  # 5 MB are more than the kernel's buffers
            if rng.random() < 0.7:
                yield Await((number,))
                yield Read(number)
        if rng.random() < 0.6:
            yield Await((number,))


def _merge(rng: random.Random, scripts: list[list[Step]]) -> list[Step]:
    """Interleave scripts, each in its own order."""
    turns = [number for number, script in enumerate(scripts) for _ in script]
    rng.shuffle(turns)
    if rng.random() < 0.3:
        turns.sort(key=lambda number: number // 3)  # groups of clients, one after another
    left = [iter(script) for script in scripts]
    return [next(left[number]) for number in turns]


def _events(rng: random.Random) -> list[Step]:
    """Return what the operator does besides stopping."""
    choices: list[Step] = [
        Reload("limits", "write_buffer", rng.choice((1, 5000, 500_000))),
        Reload("limits", "backlog", rng.choice((200, 2000))),
        Reload("log", "level", rng.choice(("debug", "info"))),
        ReloadBroken(rng.choice(("syntax", "value", "certificate"))),
        SwapCertificate(),
        Rotate(),
        Rotate(),
        HangUp(),
    ]
    return rng.sample(choices, rng.choices((0, 1, 2, 4), (50, 25, 15, 10))[0])


def _freeze(rng: random.Random, steps: list[Step]) -> None:
    """Stop the process for some of the steps."""
    start = rng.randint(0, len(steps))
    end = min(len(steps), start + rng.randint(1, 8))
    steps.insert(end, Continue())
    steps.insert(start, Freeze())
