"""The number of processor cores that this process may use, by its affinity and its container.

The limit of a container is a CPU quota of its control group (cgroup), which neither the number of
cores nor the affinity shows: without it a job with 4 of 128 cores would start 128 workers.
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
    """Return the number of cores this process may use, at least 1.

    It is that of the affinity, or the CPU quota if that is less.
    """
    if sys.platform == "linux":
        pinned = len(os.sched_getaffinity(0))
        return min(pinned, cpu_quota(_MEMBERSHIP, _CGROUPS) or pinned)
    return os.cpu_count() or 1


def cpu_quota(membership: Path, mount: Path) -> int | None:
    """Return the number of cores that a process's control groups allow, rounded up.

    Returns None without a limit. `membership` is the process's `/proc/self/cgroup`, and `mount` is
    the folder where the groups are mounted. Both versions of control groups are read; the kernel's
    `cgroup-v2.rst` (`cpu.max`) and `sched-bwc.rst` (`cpu.cfs_quota_us`) describe their formats.
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
    """Yield the groups of a process and all groups that contain them, relative to the mount.

    The limit of every one of them applies. The mount itself is always among them: in a container of
    version 1 the paths are those of the host, and only the mount exists.
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
    """Return the words of a file; an empty list if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
