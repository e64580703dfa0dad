"""A small Qwen2 model with random weights and a word-level tokenizer: nothing needs to be downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelShape:
    """KV bytes per token are layers * kv_heads * head_dim * 2 (K and V) * 2 (bfloat16)."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 2048
    max_tokens: int = 8192
    seed: int = 0

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * self.head_dim * 4


SMALL = ModelShape()
WIDE_KV = ModelShape(layers=28, hidden=256, heads=4, kv_heads=4, head_dim=128)
"""56 KiB of KV per token, as a model of some 7 B parameters has."""


def build_model(directory: Path, shape: ModelShape = SMALL) -> Path:
    """Write the model unless it is there; returns ``directory``."""
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(shape.vocabulary - 3)}
    special = {"<unk>": shape.vocabulary - 3, "<s>": shape.vocabulary - 2, "</s>": shape.vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words | special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(directory)
    torch.manual_seed(shape.seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_tokens,
        initializer_range=0.2,
        bos_token_id=special["<s>"],
        eos_token_id=special["</s>"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory
