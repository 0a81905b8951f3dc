"""Seconds and peak memory of the phases of an update."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MIB = 2**20
INTERVAL = 0.05  # seconds between two looks at the process's memory
STATM = Path("/proc/self/statm")


class Phases:
    """What each named phase took; `figures` is what a logger is given.

    Seconds are wall time without waiting for the device, so that measuring costs nothing: on CUDA
    a phase is charged for what is still in the queue when it begins. Every phase of an update
    ends by reading numbers from the device, which waits for it, so that little is.

    Memory on CUDA is the most that PyTorch's allocator held during the phase. Elsewhere it is the
    most that the process held resident, looked at 20 times a second, where the system has /proc;
    without it there is no figure.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.figures: dict[str, float] = {}

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Sets seconds/`name` and memory_mib/`name`."""
        memory = allocated_peak(self.device) if self.device.type == "cuda" else resident_peak()
        begin = time.perf_counter()
        with memory as peak:
            yield
        self.figures[f"seconds/{name}"] = time.perf_counter() - begin
        if peak:
            self.figures[f"memory_mib/{name}"] = max(peak) / MIB

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(v for name, v in self.figures.items() if name.startswith("seconds/"))


@contextmanager
def allocated_peak(device: torch.device) -> Iterator[list[int]]:
    """A list that holds, in the end, the peak of PyTorch's CUDA allocator in bytes."""
    torch.cuda.reset_peak_memory_stats(device)
    peak: list[int] = []
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device))


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """A list that holds, in the end, how many bytes the process held resident, now and then.

    Not the kernel's own high-water mark: it spans the whole process, and resetting it would spoil
    what `time -v` says of a run.
    """
    seen: list[int] = []
    if not STATM.exists():
        yield seen
        return
    page, ended = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def look() -> None:
        seen.append(int(STATM.read_bytes().split()[1]) * page)

    def keep_looking() -> None:
        while not ended.wait(INTERVAL):
            look()

    look()
    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()
        look()
