"""Kill a process as a test does, without the shared memory that Fast DDS would leave behind.

A participant frees its segment (35 MB with config/fastdds.xml) when it ends, unless it is killed.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
from pathlib import Path

MEMORY = Path('/dev/shm')
SEGMENT = re.compile('fastdds_[0-9a-f]{16}')  # not the ports, which several processes share


def segments(pid: int) -> set[Path]:
    """Fast DDS's segments that a process has mapped: its own, and those of who sent to it."""
    try:
        maps = Path(f'/proc/{pid}/maps').read_text()
    except OSError:  # it ended
        return set()
    files = {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines() if '/' in line}
    return {file for file in files if file.parent == MEMORY and SEGMENT.fullmatch(file.name)}


def kill(process: subprocess.Popen) -> None:
    """kill -9, and remove the segments that the process had mapped and nobody owns any more."""
    if process.poll() is not None:
        return
    mapped = segments(process.pid)
    process.kill()
    process.wait()
    for segment in mapped:
        _remove_orphan(segment)


def _lock_of(segment: Path) -> Path:
    return segment.with_name(f'{segment.name}_el')


def _remove_orphan(segment: Path) -> None:
    """Remove a segment unless a living process holds its lock, as `fastdds shm clean` does."""
    lock = _lock_of(segment)
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            segment.unlink(missing_ok=True)
            lock.unlink()
    except (BlockingIOError, FileNotFoundError):
        return
