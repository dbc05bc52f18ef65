# SPDX-License-Identifier: Apache-2.0
"""From a BF16 GPT-OSS to packed MXFP4 experts and back: `pack` and `unpack`.

`names` and `source` know how trainers save, `adapter` merges a LoRA, `encode` rounds, `draft` writes a folder that
appears whole or can be gone on with, `manifest` holds its checksums.
"""

from vllm_mxfp4_sm120.packing.draft import Stopped
from vllm_mxfp4_sm120.packing.manifest import verify
from vllm_mxfp4_sm120.packing.pack import Options, pack
from vllm_mxfp4_sm120.packing.unpack import unpack

__all__ = ["Options", "Stopped", "pack", "unpack", "verify"]
