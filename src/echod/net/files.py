"""Read the files that the settings name, whatever kind of file each of them is."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

# The size of the largest file that is read. A device such as /dev/zero has no end.
LARGEST = 16 * 1024 * 1024

_PIECE = 64 * 1024


class Content(NamedTuple):
    """The content of a file."""

    data: bytes
    regular: bool
    """Whether it is a regular file, which can be read again."""


def read(file: str) -> Content:
    """Return the content of a file.

    The file is read in pieces. A signal is handled between two of them, so that it can end a start that reads a device.

    Raises:
        OSError: the file cannot be opened or read, or is larger than 16 MiB.

    """
    data = bytearray()
    with Path(file).open("rb", buffering=0) as opened:  # a buffer would read on after the end of a terminal's input
        regular = stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
        while piece := opened.read(_PIECE):
            data += piece
            if len(data) > LARGEST:
                raise OSError(errno.EFBIG, f"it is larger than {LARGEST // 1024**2} MiB")
    return Content(bytes(data), regular)
