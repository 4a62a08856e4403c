import os
import subprocess
import sys

import pytest

from capmerge.cores import cpu_quota, usable_cores


def quota(tmp_path, membership, files):
    """`cpu_quota` of a process in the groups of `membership`, with `files` below the mount."""
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(tmp_path / "cgroup", tmp_path / "mount")


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": ""}, None),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/a\n", {"other/cpu.max": "100000 100000\n"}, None),
    ],
    ids=str,
)
def test_quota_of_version_2(tmp_path, membership, files, cores):
    """The limit is the least `cpu.max` of a group and of those around it, rounded up."""
    assert quota(tmp_path, membership, files) == cores


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("group", ["", "docker/abc/"])
@pytest.mark.parametrize(("microseconds", "cores"), [("250000", 3), ("-1", None)])
def test_quota_of_version_1(tmp_path, mount, group, microseconds, cores):
    """The quota is in two files, in the group of the process or, in a container, at the mount."""
    folder = f"{mount}/{group}"
    files = {f"{folder}cpu.cfs_quota_us": microseconds, f"{folder}cpu.cfs_period_us": "100000\n"}
    membership = "3:memory:/elsewhere\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/x:y\n"
    assert quota(tmp_path, membership, files) == cores


def test_no_groups_at_all(tmp_path):
    """A system without control groups has no limit."""
    assert cpu_quota(tmp_path / "none", tmp_path / "none") is None


def test_usable_cores_are_some():
    """The number of cores is at least one, and at most that of this machine."""
    assert 1 <= usable_cores() <= os.cpu_count()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins processes this way")
def test_a_pinned_process_has_one_core():
    """A process that is pinned to one core starts one worker."""
    code = (
        "import os; from capmerge.cores import usable_cores; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) == 1
