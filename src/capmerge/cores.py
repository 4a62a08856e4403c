"""How many processor cores this process may use: its affinity, and the limit of its container.

A container's limit is a CPU quota of its control group (cgroup), which neither the number of cores
nor the affinity shows: a job with 4 of 128 cores would start 128 workers.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_V1_CONTROLLERS = ("cpu,cpuacct", "cpu")
"""Names under which version 1 mounts the controller of CPU quotas."""


def usable_cores() -> int:
    """The cores this process may use, at least 1: its affinity, or its CPU quota if that is less."""
    if sys.platform == "linux":
        pinned = len(os.sched_getaffinity(0))
        return min(pinned, cpu_quota(_MEMBERSHIP, _CGROUPS) or pinned)
    return os.cpu_count() or 1


def cpu_quota(membership: Path, mount: Path) -> int | None:
    """The cores that its control groups leave a process, rounded up; None without a limit.

    `membership` is its `/proc/self/cgroup`, `mount` where the groups are mounted. Both versions
    are read; their formats stand in the kernel's `cgroup-v2.rst` (`cpu.max`) and `sched-bwc.rst`
    (`cpu.cfs_quota_us`).
    """
    quotas = []
    for group in _groups(membership):
        quotas.append(_read(mount / group / "cpu.max"))
        for controller in _V1_CONTROLLERS:
            folder = mount / controller / group
            quotas.append(_read(folder / "cpu.cfs_quota_us") + _read(folder / "cpu.cfs_period_us"))
    cores = [
        max(1, math.ceil(int(quota[0]) / int(quota[1])))
        for quota in quotas
        if len(quota) == 2 and all(number.isdecimal() for number in quota) and int(quota[1])
    ]
    return min(cores, default=None)


def _groups(membership: Path) -> Iterator[str]:
    """The groups of a process and all groups around them, relative to the mount.

    The limit of each one holds. The mount itself is always among them: in a container of version 1
    the paths are those of the host, and only the mount is there.
    """
    yield "."
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:  # hierarchy:controllers:/path
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            group = Path(path.lstrip("/"))
            yield from map(str, (group, *group.parents))


def _read(path: Path) -> list[str]:
    """The words of a file; none where there is no such file."""
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
