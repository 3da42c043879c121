"""Conflicts: settings that are valid one by one and do not work together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from echod import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic_core import ErrorDetails

    from echod.settings.types import Key

CONFLICT = "conflict"
"""The type of a conflict among the errors of a ValidationError."""


class Conflict(NamedTuple):
    """A setting that conflicts with others."""

    key: Key
    message: str


def raise_all(title: str, conflicts: Iterable[Conflict], errors: Iterable[ErrorDetails] = ()) -> None:
    """Raise one ValidationError for all errors and conflicts, if there are any.

    Args:
        title: the name of the model.
        conflicts: reported after the errors.
        errors: those of an earlier ValidationError.

    Raises:
        ValidationError: there is an error or a conflict.

    """
    details = [
        InitErrorDetails(type=PydanticCustomError(error["type"], error["msg"]), loc=error["loc"], input=error["input"])
        for error in errors
    ]
    details += [
        InitErrorDetails(type=PydanticCustomError(CONFLICT, message), loc=key, input=None) for key, message in conflicts
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


def repeated(places: Iterable[tuple[Key, str]]) -> Iterator[Conflict]:
    """Yield a conflict for each address that occurs earlier in the sequence.

    Port 0 stands for another free port each time, so different keys may share it.

    Args:
        places: keys, and the address that each contains. A key with several addresses occurs once for each.

    """
    seen: set[addresses.Address] = set()
    for key, text in places:
        address = addresses.parse(text)
        free_port = isinstance(address, addresses.TcpAddress) and not address.port
        if address in seen and (not free_port or key == ("listen",)):
            yield Conflict(key, f"{text!r} is already listened on: choose another address")
        seen.add(address)
