# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM. What a test puts in the place of something that isn't here comes first, in vLLM's workers, too."""

import os

if "VLLM_DP_SIZE" in os.environ:
    from tests.engine import cpu_gatherv  # noqa: F401
if "FAKE_DENSE" in os.environ:
    from tests.engine import fake_dense  # noqa: F401
