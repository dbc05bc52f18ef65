# SPDX-License-Identifier: Apache-2.0
"""Timing one layer on this machine, for `mxfp4-sm120 bench` and `tune`; nothing that serves imports it."""
