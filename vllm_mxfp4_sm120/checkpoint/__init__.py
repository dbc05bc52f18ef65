# SPDX-License-Identifier: Apache-2.0
"""GPT-OSS checkpoints: what config.json says, every tensor that the model needs, checked reading, whole writing.

`config`, `names` and `tensors` know the model, `headers` and `read` a folder, `write` makes one. What loads from
elsewhere goes through `checked`.
"""

from vllm_mxfp4_sm120.checkpoint.config import (
    KEYS,
    MODEL_TYPE,
    PACK_LAYOUT,
    QUANT_METHODS,
    AttentionSizes,
    Fate,
    Packing,
    Sizes,
    check_config,
    published_config,
)
from vllm_mxfp4_sm120.checkpoint.headers import INDEX, read_headers
from vllm_mxfp4_sm120.checkpoint.names import canonical_name, refuse_foreign
from vllm_mxfp4_sm120.checkpoint.read import Checkpoint
from vllm_mxfp4_sm120.checkpoint.tensors import (
    FiniteCheck,
    TensorInfo,
    as_published,
    check_finite,
    check_tensor,
    checked,
    expert_tensors,
    required_tensors,
)
from vllm_mxfp4_sm120.checkpoint.write import Writer

__all__ = [
    "INDEX",
    "KEYS",
    "MODEL_TYPE",
    "PACK_LAYOUT",
    "QUANT_METHODS",
    "AttentionSizes",
    "Checkpoint",
    "Fate",
    "FiniteCheck",
    "Packing",
    "Sizes",
    "TensorInfo",
    "Writer",
    "as_published",
    "canonical_name",
    "check_config",
    "check_finite",
    "check_tensor",
    "checked",
    "expert_tensors",
    "published_config",
    "read_headers",
    "refuse_foreign",
    "required_tensors",
]
