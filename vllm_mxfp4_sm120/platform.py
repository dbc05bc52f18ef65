# SPDX-License-Identifier: Apache-2.0
"""What is this machine: accelerator, compute capability, CUDA version, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

# The first CUDA that compiles for each capability (CUDA release notes): an older one has no code for the card.
FIRST_CUDA = {
    (8, 0): (11, 0),
    (8, 6): (11, 1),
    (8, 7): (11, 4),
    (8, 9): (11, 8),
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (10, 3): (12, 9),
    (12, 0): (12, 8),
    (12, 1): (12, 9),
}


@dataclass(frozen=True)
class Machine:
    """The facts a backend is chosen by. `capability` is None on a machine without an NVIDIA GPU.

    `cuda` is the version torch was built for, None for a CPU build. Hashable: decisions are remembered by it.
    """

    capability: tuple[int, int] | None
    cuda: tuple[int, ...] | None
    name: str = "cpu"

    @property
    def family(self) -> int:
        """Capabilities that share kernels: 80 (8.x), 90, 100 (10.x), 120 (12.x), other majors likewise; 0 for CPU."""
        return 0 if self.capability is None else self.capability[0] * 10

    @property
    def sm(self) -> str:
        """'sm_120', as compilers call it; 'cpu' without a GPU."""
        return "cpu" if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def first_cuda(self) -> tuple[int, ...]:
        """The oldest CUDA that knows this card; a minor newer than the table needs what its family's newest does."""
        if self.capability is None:
            return ()
        if self.capability in FIRST_CUDA:
            return FIRST_CUDA[self.capability]
        return max((cuda for known, cuda in FIRST_CUDA.items() if known[0] == self.capability[0]), default=())

    def why_unsupported(self) -> str | None:
        """One line saying why nothing can run on this card with this torch; None if something can, and on a CPU."""
        if self.capability is None:
            return None
        if self.capability < (8, 0):
            return f"{self.name} ({self.sm}) has no BF16 tensor cores: a card of sm_80 or newer is needed"
        need = ".".join(map(str, self.first_cuda))
        if self.cuda is None:
            return f"torch is a CPU build, {self.name} ({self.sm}) needs one for CUDA {need} or newer"
        if self.cuda < self.first_cuda:
            have = ".".join(map(str, self.cuda))
            return f"torch is built for CUDA {have}, {self.name} ({self.sm}) needs one for CUDA {need} or newer"
        return None

    @classmethod
    def here(cls, first_gpu: int = 0) -> Machine:
        """This machine, seen through torch. That initialises CUDA: a process that will fork asks NVML instead.

        Its GPU is `current_gpu(first_gpu)`. Raises ValueError for one that isn't there.
        """
        cuda = parse_cuda(torch.version.cuda)
        if not torch.cuda.is_available() or torch.version.hip is not None:
            return cls(None, cuda)
        device, count = current_gpu(first_gpu), torch.cuda.device_count()
        if device >= count:
            raise ValueError(f"GPU {device} isn't there: this process sees GPUs 0 to {count - 1}")
        return cls(torch.cuda.get_device_capability(device), cuda, torch.cuda.get_device_name(device))


def current_gpu(first: int = 0) -> int:
    """Index of the process's current GPU, or before it has one, `first`."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else first


def is_sm120_supported(machine: Machine | None = None) -> bool:
    """Is it RTX / workstation Blackwell (SM 12.x, any minor), with a torch whose CUDA knows it: 12.8, SM 12.1 12.9."""
    return _supported(machine, 120)


def is_sm100_supported(machine: Machine | None = None) -> bool:
    """Is it data-centre Blackwell (SM 10.x), with a torch whose CUDA knows it: 12.8, SM 10.3 12.9."""
    return _supported(machine, 100)


def is_sm90_supported(machine: Machine | None = None) -> bool:
    """Is it Hopper (SM 9.0), with a torch whose CUDA knows it: 11.8."""
    return _supported(machine, 90)


def _supported(machine: Machine | None, family: int) -> bool:
    machine = machine or Machine.here()
    return machine.family == family and machine.why_unsupported() is None


def parse_cuda(version: str | None) -> tuple[int, ...] | None:
    """'12.10' -> (12, 10), so that versions compare as numbers; None stays None (a CPU build of torch)."""
    return None if version is None else tuple(int(part) for part in re.findall(r"\d+", version))


def driver() -> str | None:
    """The NVIDIA driver's version as Linux states it, '580.95.05'; None where there is none to ask."""
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found and found[1]
