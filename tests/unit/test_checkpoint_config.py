# SPDX-License-Identifier: Apache-2.0
"""The table of config.json's keys is whole, and its constants are those that vLLM and transformers compute with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest

from vllm_mxfp4_sm120 import config_path
from vllm_mxfp4_sm120.checkpoint import KEYS, Fate, check_config, published_config

TABLE = {key.name: key for key in KEYS}


def test_every_key_that_transformers_reads_is_in_the_table():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss import modeling_gpt_oss

    source = inspect.getsource(modeling_gpt_oss)
    read = set(re.findall(r'\bconfig\.([a-z]\w+)|getattr\(config, "(\w+)"', source))
    names = {name for pair in read for name in pair if name} - {"rope_parameters"}
    assert len(names) > 15
    own = set(GptOssConfig.__annotations__) - {"model_type", "attribute_map"}
    assert own <= {field.name for field in dataclasses.fields(GptOssConfig)}
    assert (names | own) - set(TABLE) == set()


def test_every_key_of_the_published_files_is_in_the_table_or_read_by_nobody():
    unread = {"architectures", "torch_dtype", "initial_context_length", "experts_per_token"}
    for config in (published_config("openai/gpt-oss-20b"), json.loads(config_path("tiny", "config.json").read_text())):
        assert set(config) - set(TABLE) == unread


def test_fixed_values_are_the_defaults_of_transformers():
    from transformers import GptOssConfig

    defaults = GptOssConfig().to_dict()
    for key in KEYS:
        assert key.why
        assert key.fate is not Fate.FIXED or defaults.get(key.name) == key.served, key.name


def test_fixed_values_are_those_of_vllm():
    gpt_oss = pytest.importorskip("vllm.model_executor.models.gpt_oss")
    attention, block = inspect.getsource(gpt_oss.OAIAttention), inspect.getsource(gpt_oss.TransformerBlock)
    assert attention.count("bias=True") == 2 and "attention_bias" not in attention
    assert block.count("eps=1e-5") == 2 and "rms_norm_eps" not in inspect.getsource(gpt_oss)
    assert "config.sliding_window if self.layer_idx % 2 == 0 else None" in attention
    assert '"rope_type": "yarn"' in attention and "attention_factor" not in attention and "mscale" not in attention
    assert "hidden_act" not in inspect.getsource(gpt_oss)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "openai/gpt-oss-120b"])
def test_published_models_are_served(name):
    """From the file, and as vLLM hands it on: transformers' view of it."""
    from transformers import GptOssConfig

    check_config(published_config(name))
    config = GptOssConfig(**published_config(name)).to_dict()
    check_config(config)
    with pytest.raises(ValueError, match=r"^here: swiglu_limit is 5.0, expected 7.0"):
        check_config(config | {"swiglu_limit": 5.0}, "here")
