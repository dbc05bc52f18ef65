# SPDX-License-Identifier: Apache-2.0
"""benchmarks/engine.py without an engine: when two answers count as the same, and whose a kernel is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

engine = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "engine.py"))

FIRST = [{"5": -1.0, "7": -2.0}, {"6": -1.5, "8": -1.51}, {"9": -0.1, "3": -4.0}]


@pytest.mark.parametrize(
    ("second", "outcome", "within"),
    [
        (FIRST, "the same", 0.0),
        ([{"5": -1.03}, {"6": -1.5}, {"9": -0.1}], "the same", 0.03),
        # Parted at a tie: the last token is another prompt's.
        ([{"5": -1.0}, {"8": -1.5, "6": -1.505}, {"4": -1.0}], "tied", 0.0),
        ([{"5": -1.0}, {"8": -1.4, "6": -1.505}, {"4": -1.0}], "different", 0.0),
        ([{"5": -1.0}, {"8": -1.5, "2": -1.505}, {"4": -1.0}], "different", 0.0),
    ],
    ids=["the same", "another log-probability", "tied", "too far apart", "not listed by both"],
)
def test_answers_compare(second: list, outcome: str, within: float) -> None:
    got, worst = engine["compare"](FIRST, second)
    assert (got, worst) == (outcome, pytest.approx(within))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void mxfp4_sm120::(anonymous namespace)::grouped_gemms<Shape<64>>(mxfp4_sm120::Layer)", "MoE"),
        ("void marlin_moe_wna16::Marlin<__nv_bfloat16>", "MoE"),
        ("_p_matmul_ogs_NNT_bf16xbf16xmxfp4_16x256x128x1_swiglu", "MoE"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<1>>(Params)", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_bias_TNN", "GEMM"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm"),
        ("Memcpy DtoH (Device -> Pinned)", "other"),
    ],
)
def test_kernels_belong_somewhere(kernel: str, group: str) -> None:
    assert engine["group_of"](kernel) == group


def test_choices_are_arguments_of_vllm() -> None:
    arguments = engine["engine_arguments"]
    assert arguments("ours") == {"quantization": "mxfp4_sm120"}
    assert arguments("ours:triton-ep2") == {
        "quantization": "mxfp4_sm120",
        "additional_config": {"mxfp4_sm120": {"backend": "triton"}},
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    }
    assert arguments("ours:native-int8-tp2") == {
        "quantization": "mxfp4_sm120",
        "additional_config": {"mxfp4_sm120": {"backend": "native", "dense": "int8"}},
        "tensor_parallel_size": 2,
        "enable_expert_parallel": False,
    }
    assert arguments("ours-pp2") == {"quantization": "mxfp4_sm120", "pipeline_parallel_size": 2}
    assert arguments("marlin") == {"quantization": "mxfp4", "moe_backend": "marlin"}
    for wrong in ("marlin:x", "marlin-int8"):
        with pytest.raises(ValueError, match=f"--choices has '{wrong}', expected such as ours"):
            arguments(wrong)
