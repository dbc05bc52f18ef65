# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/engine.py asks of vLLM's workers. As their `worker_extension_cls`, this module is imported in each

of them before anything is loaded.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity

# vLLM resets torch's peaks once the weights are loaded, before anyone could ask for them: what they were before each
# reset, of memory in use, and of that together with what torch keeps for itself.
peaks: list[int] = []
reserved: list[int] = []
reset = torch.cuda.reset_peak_memory_stats


def keep_and_reset(device: torch.device | int | None = None) -> None:
    peaks.append(torch.cuda.max_memory_allocated(device))
    reserved.append(torch.cuda.max_memory_reserved(device))
    reset(device)


torch.cuda.reset_peak_memory_stats = keep_and_reset


class Watch:
    """Becomes a base class of vLLM's worker, whose methods can be called by name from outside."""

    def gpu_memory(self) -> dict[str, float]:
        """GiB of this worker's GPU; empty where there is none."""
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        memory = {
            "peak GiB while loading": max(peaks, default=0),
            "with torch's reserve": max(reserved, default=0),
            "GiB in use": total - free,
        }
        if hasattr(self, "total_consumed"):  # not measured by vLLM where the size of the KV cache was given
            memory["GiB before the KV cache"] = self.total_consumed + self.peak_activation_memory
        return {name: value / 2**30 for name, value in memory.items()}

    def start_recording(self) -> None:
        """From now on, every kernel; on a CPU, every operator."""
        self.on_gpu = torch.cuda.is_available()
        self.recorder = torch.profiler.profile(
            activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU]
        )
        self.recorder.start()

    def stop_recording(self) -> dict[str, tuple[int, float]]:
        """Calls and microseconds of each since `start_recording`."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.recorder.stop()
        return {
            event.key: (event.count, event.self_device_time_total if self.on_gpu else event.self_cpu_time_total)
            for event in self.recorder.key_averages()
            if not event.is_user_annotation
        }
