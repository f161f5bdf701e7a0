"""What the control groups of this process leave it of the machine: Linux, v1 and v2, its own group and all above it.

root: where /proc and /sys are looked for; only tests look elsewhere.
"""

from __future__ import annotations

import os

# fallbacks where /proc/self/mountinfo cannot be read: (type of file system, root of the mount, folder)
_USUAL_MOUNTS = (("cgroup2", "/", "/sys/fs/cgroup"), ("cgroup", "/", "/sys/fs/cgroup/{controller}"))


def read(path: str) -> str:
    """The text of a system file without the blanks around it; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def cpu_quota(root: str = "/") -> float | None:
    """CPUs' worth of time that the quotas allow; None: they set no limit."""
    return min((quota for folder in folders("cpu", root) if (quota := _quota(folder)) is not None), default=None)


def available_memory(root: str = "/") -> int | None:
    """Bytes that the memory limits leave; None: there is no limit. File cache counts as free because it can be dropped."""
    return min((room for folder in folders("memory", root) if (room := _room(folder)) is not None), default=None)


def folders(controller: str, root: str = "/") -> list[str]:
    """The folders of this process's groups that may limit it by a controller, each hierarchy from the own group upwards."""
    found = []
    for kind, mount_root, folder in _mounts(controller, root):
        below = _below(_own_group("" if kind == "cgroup2" else controller, root), mount_root)
        found += [os.path.join(root, folder.lstrip("/"), *below[:n]) for n in range(len(below), -1, -1)]
    return found


def _mounts(controller: str, root: str) -> list[tuple[str, str, str]]:
    """(type, root of the mount, folder) of the hierarchies that have the controller or may have it."""
    found = []
    for line in read(os.path.join(root, "proc/self/mountinfo")).splitlines():
        place, kind = (half.split() for half in (line.split(" - ", 1) + [""])[:2])
        if len(place) > 4 and len(kind) > 2 and (kind[0] == "cgroup2" or kind[0] == "cgroup" and controller in kind[2].split(",")):
            found.append((kind[0], place[3], place[4]))
    return found or [(kind, top, folder.format(controller=controller)) for kind, top, folder in _USUAL_MOUNTS]


def _own_group(controller: str, root: str) -> str:
    """The path of this process's group in the hierarchy of a v1 controller, or with "" in that of v2."""
    for line in read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            return path
    return "/"


def _below(group: str, mount_root: str) -> list[str]:
    """The folders from a mount to a group; none where the group's path is one of another namespace."""
    top = mount_root.rstrip("/")
    names = group[len(top):].strip("/").split("/") if (group + "/").startswith(top + "/") else []
    return [] if ".." in names else [name for name in names if name]


def _quota(folder: str) -> float | None:
    quota, _, period = read(f"{folder}/cpu.max").partition(" ")
    if not quota:
        quota, period = read(f"{folder}/cpu.cfs_quota_us"), read(f"{folder}/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _room(folder: str) -> int | None:
    """Bytes between a group's limit and what it uses for good."""
    limit, used = read(f"{folder}/memory.max"), read(f"{folder}/memory.current")
    cache, shared = "file", "shmem"
    if not limit:
        limit, used = read(f"{folder}/memory.limit_in_bytes"), read(f"{folder}/memory.usage_in_bytes")
        cache, shared = "total_cache", "total_shmem"
    if not limit.isdigit() or not used.isdigit():
        return None
    stat = dict(line.split()[:2] for line in read(f"{folder}/memory.stat").splitlines() if len(line.split()) > 1)
    droppable = int(stat.get(cache, 0)) - int(stat.get(shared, 0))  # memory files (tmpfs) count as cache but stay
    return max(0, int(limit) - int(used) + max(0, droppable))
