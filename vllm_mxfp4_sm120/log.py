# SPDX-License-Identifier: Apache-2.0
"""The plugin's logger, below vLLM's so that its settings of format and level hold."""

import logging

logger = logging.getLogger("vllm.mxfp4_sm120")
