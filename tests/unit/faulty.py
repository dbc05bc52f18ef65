# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong in each way that a proof must survive; and one that isn't."""

import os
import signal
import subprocess
import time
from pathlib import Path

import torch

from vllm_mxfp4_sm120.backends.tiled import Tiled


class Good(Tiled):
    name = "good"
    compiled = True


class Wrong(Good):
    """One expert's gate, of eight, is 30 % too large."""

    name = "wrong"

    def forward(self, prepared, x, topk_ids, topk_weights, expert_map=None):
        return super().forward(prepared, x, topk_ids, topk_weights * (1 + 0.3 * (topk_ids == 2)), expert_map)


class NotANumber(Good):
    name = "not_a_number"

    def forward(self, prepared, x, topk_ids, topk_weights, expert_map=None):
        return torch.full_like(x, float("nan"))


class Raises(Good):
    name = "raises"

    def forward(self, *arguments):
        raise RuntimeError("no kernel image is available\nfor execution on the device")


class Hangs(Good):
    name = "hangs"

    def forward(self, *arguments):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


class StartsACompiler(Hangs):
    """One that outlives a kill of its parent alone; hangs once it's started."""

    name = "starts_a_compiler"

    def forward(self, *arguments):
        subprocess.Popen(["sleep", "300"])
        Path(os.environ["STARTED"]).touch()
        super().forward()


class Kills(Good):
    name = "kills"

    def forward(self, *arguments):
        os.kill(os.getpid(), signal.SIGSEGV)


class Misroutes(Good):
    """Right experts behind a router that forgets its bias."""

    name = "misroutes"
    has_router = True

    def router_logits(self, x, weight, bias):
        return super().router_logits(x, weight, None)
