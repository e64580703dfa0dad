"""A small Qwen2 model with random weights and a byte-level tokenizer: nothing needs to be downloaded."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pd_connector.errors import ConfigError

_SPECIAL = ("<unk>", "<s>", "</s>")


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
    def words(self) -> int:
        """Token ids below this are ordinary tokens; behind them come the special ones."""
        return self.vocabulary - len(_SPECIAL)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * self.head_dim * 4


SMALL = ModelShape()
WIDE_KV = ModelShape(layers=28, hidden=512, heads=4, kv_heads=4, head_dim=128)
"""56 KiB of KV per token, as a model of some 7 B parameters has."""


def build_model(directory: Path, shape: ModelShape = SMALL) -> Path:
    """Write the model unless it is there; returns ``directory``. Raises ConfigError when a library is missing."""
    if (directory / "model.safetensors").exists():
        return directory
    # Whole or not at all: an interrupted build must not pass for a model the next time.
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        _write(draft, shape)
        draft.rename(directory)
    except ModuleNotFoundError as error:
        raise ConfigError(f"building the model needs {error.name!r}: pip install 'pd-connector[demo,torch]'") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def _write(directory: Path, shape: ModelShape) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Qwen2's tokenizer is byte-level BPE whatever a saved one says. Without merges every byte of a text is one token;
    # the other tokens only come out of the model.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"w{i}" for i in range(len(alphabet), shape.words)]
    special = {name: shape.words + i for i, name in enumerate(_SPECIAL)}
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)} | special, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
