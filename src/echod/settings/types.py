"""Types of single settings: a Python type, and the validators of its values."""

# Annotations are not deferred here: Pydantic would have to evaluate each of them again at every start.

import math
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field
from pydantic_core import PydanticCustomError

from echod.net import addresses

ADMIN_FORMS = "HOST:PORT, [V6]:PORT, :PORT, unix:PATH or unix:@NAME"

# The event loops and the kernel take these numbers as a C int.
_HIGHEST_COUNT = 2**31 - 1
_LARGEST_SIZE = 2**30

Key = tuple[str, ...]
"""The path of a setting, such as ("limits", "backlog")."""


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        kind = "number_type"
        raise PydanticCustomError(kind, "Input should be a number")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        kind = "finite_number"
        raise PydanticCustomError(kind, "Input should be a finite number")
    return value


def is_utf8(text: str) -> bool:
    """Tell whether a text can be encoded. The command line and the environment may contain any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(text: str) -> str:
    if not is_utf8(text):
        kind = "text"
        raise PydanticCustomError(kind, "Input should be UTF-8 text")
    return text


def _file_name(text: str) -> str:
    if not text or "\0" in text:
        kind = "file_name"
        raise PydanticCustomError(kind, "Input should be the name of a file")
    return text


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
    return text


def split(value: object) -> object:
    """Split a text at its commas. Return all other values as they are."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _network(text: str) -> str:
    try:
        addresses.network(text)
    except ValueError:
        kind = "network"
        message = "Input should be a network such as '10.0.0.0/8' or '2001:db8::/32', or an address"
        raise PydanticCustomError(kind, message) from None
    return text


def _mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        kind = "permissions"
        raise PydanticCustomError(kind, "Input should be permissions in octal, such as '0660'")
    return text


Seconds = Annotated[float, BeforeValidator(_no_bool), AfterValidator(_finite), Field(ge=0)]
PositiveSeconds = Annotated[Seconds, Field(gt=0)]
Size = Annotated[ByteSize, BeforeValidator(_no_bool), Field(ge=1, le=_LARGEST_SIZE)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=_HIGHEST_COUNT)]
Number = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=_HIGHEST_COUNT)]
Probability = Annotated[float, BeforeValidator(_no_bool), AfterValidator(_finite), Field(gt=0, le=1)]
Trigger = Annotated[str, Field(min_length=1)]
Address = Annotated[str, AfterValidator(_address)]
AdminAddress = Annotated[str, AfterValidator(_admin_address)]
Network = Annotated[str, AfterValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(split)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(split)]
Permissions = Annotated[str, AfterValidator(_mode)]
Text = Annotated[str, AfterValidator(_text)]
FileName = Annotated[Text, AfterValidator(_file_name)]
