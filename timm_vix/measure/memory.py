"""Memory of this process and its device: the most that was in use, and how the C library and the system give it out."""

import contextlib
import ctypes
import sys
from typing import Optional

import torch

from .._device import kibibytes


class PeakMemory:
    """The most memory in use since this was made or restarted, less what was in use when it was made, in MiB.

    CUDA: of torch's allocator. CPU: of the process, by Linux's high-water mark of resident memory, less the pages of
    programme files that were read in meanwhile; elsewhere by ``getrusage``, or None where that is not known.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.restart()
        if device.startswith("cuda"):
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before, self.files = self.resident("VmRSS"), self.resident("RssFile")

    def restart(self) -> None:
        """Forget the peak so far; what was in use at the beginning stays what is subtracted."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew

    def read(self) -> Optional[float]:
        """The peak so far in MiB; None on a device whose memory isn't known."""
        if self.device.startswith("cuda"):
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        if self.device != "cpu":
            return None
        files = self.resident("RssFile") - self.files
        return (self.resident("VmHWM") - self.before - files) / 2**10

    def resident(self, field: str) -> int:
        """A memory field of this process in KiB; without /proc the peak of ``getrusage``, and 0 for "RssFile"."""
        value = kibibytes("/proc/self/status", field)
        if value is not None or field == "RssFile":
            return value or 0
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 2**10 if sys.platform == "darwin" else most


def set_malloc(largest: int) -> None:
    """Have glibc give freed blocks above so many bytes back to the system; nothing happens with another C library.

    By default it learns what to keep as it goes, so that the resident memory of equal runs differs by a third.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, largest)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 2 * largest)  # M_TRIM_THRESHOLD, in the proportion that glibc keeps


def limit_memory() -> None:
    """Make an allocation beyond the free memory fail here, before the system ends some process to find room."""
    free, used = kibibytes("/proc/meminfo", "MemAvailable"), kibibytes("/proc/self/status", "VmData")
    if free is not None and used is not None:
        import resource

        most, hard = int((used + 0.9 * free) * 2**10), resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or most < hard:  # else somebody has limited it more than this
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
