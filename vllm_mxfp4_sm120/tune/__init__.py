# SPDX-License-Identifier: Apache-2.0
"""Measuring a card's rule, for `mxfp4-sm120 tune`: `sizes` says what to time, `decide` what follows from the times.

`session` goes from one to the other and keeps what was timed; only `gpu` needs a GPU.
"""
