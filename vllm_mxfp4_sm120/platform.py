"""What is this machine: accelerator, compute capability, CUDA version, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """The facts a backend is chosen by. `capability` is None on a machine without an NVIDIA GPU.

    `family` groups capabilities that share a kernel ABI: 80, 90, 100 (10.x), 120 (12.x), 0 for CPU.
    """

    capability: tuple[int, int] | None
    cuda: tuple[int, ...] | None
    name: str = "cpu"

    @property
    def family(self) -> int:
        return 0 if self.capability is None else self.capability[0] * 10

    @classmethod
    def here(cls, device: int = 0) -> Machine:
        """This machine, seen through torch."""
        if not torch.cuda.is_available():
            return cls(None, parse_cuda(torch.version.cuda))
        return cls(torch.cuda.get_device_capability(device), parse_cuda(torch.version.cuda), torch.cuda.get_device_name(device))


def parse_cuda(version: str | None) -> tuple[int, ...] | None:
    """'12.10' -> (12, 10), so that versions compare as numbers; None stays None (a CPU build of torch)."""
    return None if version is None else tuple(int(part) for part in version.split("."))
