"""What this machine has left: bytes of RAM, and of the disk on which a path lies."""

import os
import shutil
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroups of version 1 say "no limit" by a number near 2^63


def free_ram_bytes(root: Path = Path("/")) -> int:
    """RAM that this process may still take: what the machine has available, or what its cgroups leave, if less.

    Parameters
    ----------
    root : of the file system in which the kernel tells it.
    """
    available = _available(root)
    return min([available, *_left_by_cgroups(root)])


def free_disk_bytes(path: str | os.PathLike[str]) -> int:
    """Free bytes of the disk on which a file of this path lies, or would lie."""
    return shutil.disk_usage(existing(path)).free


def existing(path: str | os.PathLike[str]) -> Path:
    """The path, or the nearest folder above it that is there."""
    place = Path(path).absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _available(root: Path) -> int:
    """What Linux calls available; elsewhere all RAM there is."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_cgroups(root: Path) -> list[int]:
    """Limit less use, of every cgroup of this process that has a limit; caches that can be dropped count as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = Path(name.lstrip("/"))
        # In a container the name may be one that is seen from outside alone; the top is then the container's own.
        for folder in (inside, *inside.parents):
            found = _left(top / folder, *files)
            if found is not None:
                left.append(found)
    return left


def _left(folder: Path, limit_file: str, use_file: str, cache: str) -> int | None:
    """What a cgroup leaves; None where it is not there or has no limit."""
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        used = int((folder / use_file).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    caches = sum(int(line.split()[1]) for line in lines if line.startswith(f"{cache} "))
    return max(int(limit) - used + caches, 0)
