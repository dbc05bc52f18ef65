# SPDX-License-Identifier: Apache-2.0
"""The linear layers around the experts: attention's projections and the vocabulary's two tables."""
