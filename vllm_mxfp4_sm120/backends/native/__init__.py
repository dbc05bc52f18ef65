# SPDX-License-Identifier: Apache-2.0
"""The CUDA library of kernels/ as a backend.

`backend` uses it, `library` loads it, `tuning` chooses among its kernels, `layout` is how weights lie.
"""

from vllm_mxfp4_sm120.backends.native.backend import Native

__all__ = ["Native"]
