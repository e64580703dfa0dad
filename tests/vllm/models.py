"""Small models of other architectures, with the tokenizer of the demo's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

WINDOW = 256
VOCABULARY = 4096


def build(kind: str, demo: Path, directory: Path) -> Path:
    """A random-weight model of this kind; ``demo`` is the demo's model."""
    import torch

    directory.mkdir(parents=True)
    for file in demo.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, directory)
    torch.manual_seed(1)
    model = {"gemma3": _gemma3, "deepseek": _deepseek, "qwen3-next": _qwen3_next}[kind]()
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def _gemma3() -> Any:
    """Sliding windows in two layers of three."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_common(), num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        sliding_window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=64,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def _deepseek() -> Any:
    """Latent attention (MLA)."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **_common(), num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, q_lora_rank=None, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=3, moe_intermediate_size=128,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config)


def _qwen3_next() -> Any:
    """Gated delta net (a state, as Mamba's) and attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_common(), num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=128,

    )  # fmt: skip
    return Qwen3NextForCausalLM(config)
