"""Count the CPUs that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable(root: Path = Path("/")) -> int:
    """Return the number of CPUs in the affinity mask, or the cgroup's quota rounded up if that is lower. At least 1.

    Args:
        root: folder that contains `proc` and `sys`.

    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _quota(root))))


def _quota(root: Path) -> float:
    """Return the lowest quota of this process's control groups in CPUs, or infinity: cgroups(7).

    The quota of version 2 is in the group's `cpu.max`. That of version 1 is in two files of the hierarchy of the controller
    cpu. Each group above may have a lower one. In a container, /proc shows groups that are not mounted there.
    """
    quotas = [math.inf]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            mount, read = root / "sys/fs/cgroup", _read_version_2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, _read_version_1
        else:
            continue
        group = Path(name.lstrip("/"))
        quotas += [read(mount / part) for part in (group, *group.parents)]
    return min(quotas)


def _read_version_2(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except OSError:
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def _read_version_1(group: Path) -> float:
    try:
        quota, period = (int((group / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
    except OSError:
        return math.inf
    return quota / period if quota > 0 else math.inf
