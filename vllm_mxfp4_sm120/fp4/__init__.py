# SPDX-License-Identifier: Apache-2.0
"""Whether a layer's activations become FP4 terms, and from how many tokens on: the card decides (docs/fp4.md)."""
