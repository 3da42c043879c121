"""Conflicts: settings that are valid one by one and do not work together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from echod.net import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic_core import ErrorDetails

    from echod.settings.types import Key, Location


class Conflict(NamedTuple):
    """A setting that conflicts with others."""

    key: Location
    message: str
    depends_on: tuple[Key, ...] = ()
    """Settings that take part in the conflict. If one of them is invalid, the conflict may be a consequence."""

    def within(self, *table: str) -> Conflict:
        """Return the conflict with the path of its table added to each key."""
        return Conflict((*table, *self.key), self.message, tuple((*table, *key) for key in self.depends_on))

    def is_consequence(self, wrong: Iterable[Location]) -> bool:
        """Tell whether the conflict depends on an invalid setting.

        Args:
            wrong: the locations of the invalid settings.

        """
        return any(_overlap(location, key) for location in wrong for key in self.depends_on)


def _overlap(one: Location, other: Location) -> bool:
    """Tell whether one of two paths leads to the other, or to a part of it."""
    return all(name == other_name for name, other_name in zip(one, other, strict=False))


def in_table(name: str, message: str, *depends_on: str) -> Conflict:
    """Return a conflict of a key with other keys of its table, which are given by name."""
    return Conflict((name,), message, tuple((other,) for other in (name, *depends_on)))


def raise_all(title: str, conflicts: Iterable[Conflict], errors: Iterable[ErrorDetails]) -> None:
    """Raise one ValidationError for all errors and conflicts, if there are any.

    Args:
        title: the name of the model.
        conflicts: reported after the errors.
        errors: those of an earlier ValidationError.

    Raises:
        ValidationError: with all of them.

    """
    details = [
        InitErrorDetails(type=PydanticCustomError(error["type"], error["msg"]), loc=error["loc"], input=error["input"])
        for error in errors
    ]
    details += [
        InitErrorDetails(type=PydanticCustomError("value_error", conflict.message), loc=conflict.key, input=None)
        for conflict in conflicts
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


def repeated(places: Iterable[tuple[Location, str]]) -> Iterator[Conflict]:
    """Yield a conflict for each address that occurs earlier in the sequence.

    Port 0 stands for another free port each time, so different keys may share it.

    Args:
        places: keys, and the address that each contains. A key with several addresses occurs once for each.

    """
    seen: set[addresses.Address] = set()
    for key, text in places:
        address = addresses.parse(text)
        free_port = isinstance(address, addresses.TcpAddress | addresses.UdpAddress) and not address.port
        if address in seen and (not free_port or key[0] == "listen"):
            yield Conflict(key, f"{text!r} is already listened on: choose another address")
        seen.add(address)
