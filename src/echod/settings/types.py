"""Types of single settings: a Python type, and the validators of its values."""

# Annotations are not deferred here: Pydantic would have to evaluate each of them again at every start.

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from echod.net import addresses
from echod.units import parse_duration, parse_size

ADMIN_FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME"

# The event loops and the kernel take these numbers as a C int.
_HIGHEST_COUNT = 2**31 - 1

LONGEST = 365 * 24 * 3600.0
"""The longest duration: a year."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

Key = tuple[str, ...]
"""The path of a setting, such as ("limits", "backlog")."""

Location = tuple[int | str, ...]
"""The path of a setting or of an item, such as ("listen", 0)."""


class Bounds(NamedTuple):
    """A validator of numbers in a range."""

    lowest: float
    highest: float
    unit: Callable[[float], str] = str
    """Formats a bound as a value of the settings."""
    parse: Callable[[Any], float] = lambda value: value
    above: bool = False
    """Whether the lowest number itself is excluded."""

    def __call__(self, value: object) -> object:
        """Return the value as a number within the bounds."""
        number = self.parse(value)
        if number > self.highest:
            message = f"should be at most {self.unit(self.highest)}"
        elif number > self.lowest or (number == self.lowest and not self.above):
            return number
        else:
            message = f"should be {'above' if self.above else 'at least'} {self.unit(self.lowest)}"
        raise _error(message)


_WORKERS = Bounds(1, 1024)

# Digits of a number of workers that are read: more than its upper bound has.
_LONGEST_COUNT = 10


def _error(message: str) -> PydanticCustomError:
    """Return an error. `echod.settings.problems` adds the value to its message."""
    kind = "unsuitable"
    return PydanticCustomError(kind, message)


def is_utf8(text: str) -> bool:
    """Tell whether a text can be encoded. The command line and the environment may contain any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(text: str) -> str:
    if not is_utf8(text):
        message = "should be UTF-8 text"
        raise _error(message)
    return text


def _file_name(text: str) -> str:
    if not text or "\0" in text:
        message = "should be the name of a file"
        raise _error(message)
    return text


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        message = "should be a number"
        raise _error(message)
    return value


def _size(value: object) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # Helm writes large whole numbers so: 1.048576e+06
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    message = 'should be bytes, or a size such as "64KiB"'
    raise _error(message)


def _seconds(value: object) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    message = 'should be seconds, or a duration such as "250ms", "10s", "5m" or "1h"'
    raise _error(message)


def _workers(value: object) -> object:
    if isinstance(value, str) and value.lower() == "auto":
        return "auto"
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value[:_LONGEST_COUNT])
    if isinstance(value, int) and not isinstance(value, bool):
        return _WORKERS(value)
    message = 'should be "auto" or a number'
    raise _error(message)


def size_text(size: float) -> str:
    """Return a size as a value of the settings, in the largest unit that leaves a whole number."""
    power = 0
    while size % 1024 == 0 and power + 1 < len(_UNITS):
        size //= 1024
        power += 1
    return f'"{size}{_UNITS[power]}"'


def _hours(seconds: float) -> str:
    return f'"{seconds / 3600:g}h"' if seconds else "0"


def _any_case(value: object, choose: ValidatorFunctionWrapHandler) -> object:
    try:
        return choose(value.lower() if isinstance(value, str) else value)
    except ValidationError:
        return choose(value)  # for an error that shows the value as the user wrote it


def _address(text: str) -> str:
    addresses.parse_bindable(text)
    return text


def _admin_address(text: str) -> str:
    if not text:
        return text
    try:
        address = addresses.parse_bindable(text)
    except addresses.AddressError as error:
        raise addresses.AddressError(str(error).replace(addresses.FORMS, ADMIN_FORMS)) from None
    if isinstance(address, addresses.InheritedAddress):
        msg = f"{text!r}: the admin listener cannot use inherited sockets: write {ADMIN_FORMS}"
        raise addresses.AddressError(msg)
    if isinstance(address, addresses.UdpAddress):
        msg = f"{text!r}: the admin listener serves HTTP over TCP, not UDP: write {ADMIN_FORMS}"
        raise addresses.AddressError(msg)
    return text


def _port(value: object) -> object:
    """Return a number as text, for which `echod.net.addresses` has advice."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def split(value: object) -> object:
    """Split a text at its commas. Return all other values as they are."""
    value = _port(value)
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _network(text: str) -> str:
    addresses.network(text)
    return text


def port_range(text: str) -> range:
    """Read a port, or the first and last port of a range: "7" or "0-1023".

    Raises:
        AddressError: the text is neither.

    """
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    ends = [part.strip() for part in (first, last)]
    if not all(
        end.isascii() and end.isdecimal() and len(end) <= 5 and int(end) <= addresses.HIGHEST_PORT for end in ends
    ):
        msg = f"{text!r} is not a port or a range of ports: write for example 2049 or 0-1023"
        raise addresses.AddressError(msg)
    lowest, highest = map(int, ends)
    if lowest > highest:
        msg = f"{text!r} is an empty range: write {highest}-{lowest}"
        raise addresses.AddressError(msg)
    return range(lowest, highest + 1)


def _ports(text: str) -> str:
    port_range(text)
    return text


def _mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        message = 'should be permissions in octal such as "0660"'
        raise _error(message)
    return text


AnyCase = WrapValidator(_any_case)
"""Makes a choice of lower-case words accept them in any case."""

Seconds = Annotated[float, BeforeValidator(Bounds(0, LONGEST, _hours, _seconds))]
PositiveSeconds = Annotated[float, BeforeValidator(Bounds(0, LONGEST, _hours, _seconds, above=True))]
Size = Annotated[ByteSize, BeforeValidator(Bounds(1, 2**30, size_text, _size))]
Count = Annotated[int, BeforeValidator(_no_bool), AfterValidator(Bounds(1, _HIGHEST_COUNT))]
Number = Annotated[int, BeforeValidator(_no_bool), AfterValidator(Bounds(0, _HIGHEST_COUNT))]
Workers = Annotated[int | Literal["auto"], BeforeValidator(_workers)]
Probability = Annotated[float, BeforeValidator(_no_bool), AfterValidator(Bounds(0, 1, above=True))]
BurstLength = Annotated[float, BeforeValidator(_no_bool), AfterValidator(Bounds(1, 1_000_000))]
Trigger = Annotated[str, Field(min_length=1)]
Address = Annotated[str, BeforeValidator(_port), AfterValidator(_address)]
AdminAddress = Annotated[str, BeforeValidator(_port), AfterValidator(_admin_address)]
Network = Annotated[str, AfterValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(split)]
Ports = Annotated[str, BeforeValidator(_port), AfterValidator(_ports)]
PortRanges = Annotated[tuple[Ports, ...], BeforeValidator(split)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(split)]
Permissions = Annotated[str, AfterValidator(_mode)]
Text = Annotated[str, AfterValidator(_text)]
FileName = Annotated[Text, AfterValidator(_file_name)]
