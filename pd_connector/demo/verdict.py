"""The verdict on one prompt: what was measured, what had to come out, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_connector.demo.client import Answer

STAGES = ("router", "p_queue", "prefill", "announce", "wire", "commit", "d_queue", "first_token", "unaccounted")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where two greedy answers part, and by how much either of them preferred its own token (the smaller margin)."""

    position: int
    margin: float

    @property
    def is_tie(self) -> bool:
        """With a margin of exactly 0 both tokens are equally right: random bfloat16 weights give such ties."""
        return self.margin == 0.0


def compare(plain: Answer, handed: Answer) -> Mismatch | None:
    """None when the tokens are equal. Behind the first mismatch the texts differ, so nothing more can be compared."""
    for position, (here, there) in enumerate(zip(plain.tokens, handed.tokens, strict=True)):
        if here != there:
            return Mismatch(position, min(plain.margin(position, there), handed.margin(position, here)))
    return None


def kv_bytes(prompt_tokens: int, block_tokens: int, model: Mapping[str, Any]) -> int:
    """Bytes of KV cache that a prompt's blocks have, from the model's own config (2: K and V; 2: bytes of bfloat16).

    One token needs no transfer: vLLM always computes the last prompt token itself.
    """
    if prompt_tokens == 1:
        return 0
    per_token = model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"] * 2 * 2
    return math.ceil(prompt_tokens / block_tokens) * block_tokens * int(per_token)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt. Bytes, tokens and digests are counts, times are milliseconds."""

    prompt_tokens: int
    mismatch: Mismatch | None
    digests_compared: int
    failed_transfers: int
    recomputed_tokens: int
    kv_bytes: int
    kv_bytes_expected: int
    transport: str
    ttft_ms: Mapping[str, float]
    plain_ttft_ms: float

    @property
    def tokens_equal_or_tie(self) -> bool:
        return self.mismatch is None or self.mismatch.is_tie

    @property
    def digests_equal(self) -> bool | None:
        """None when nothing had to be moved. The audit fails a transfer whose digests differ on the two sides."""
        if not self.kv_bytes_expected:
            return None
        return self.digests_compared > 0 and not self.failed_transfers

    def complaints(self) -> list[str]:
        """What is wrong, one sentence each; empty when D answered from P's bytes and answered right."""
        wrong = []
        if self.mismatch is not None and not self.mismatch.is_tie:
            wrong.append(f"output token {self.mismatch.position} differs, margin {self.mismatch.margin:.3g}")
        if self.failed_transfers:
            wrong.append(f"{self.failed_transfers} transfer failed")
        if self.digests_equal is False and not self.failed_transfers:
            wrong.append("no digest was compared")
        if self.recomputed_tokens:
            wrong.append(f"D computed {self.recomputed_tokens} tokens that P had")
        if self.kv_bytes != self.kv_bytes_expected:
            wrong.append(f"{self.kv_bytes} bytes moved, the prompt's blocks have {self.kv_bytes_expected}")
        return wrong

    def plain(self) -> dict[str, Any]:
        """For --json."""
        mismatch = None
        if self.mismatch is not None:
            margin = self.mismatch.margin if math.isfinite(self.mismatch.margin) else None
            mismatch = {"position": self.mismatch.position, "margin": margin}
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens_equal_or_tie": self.tokens_equal_or_tie,
            "mismatch": mismatch,
            "digests_equal": self.digests_equal,
            "digests_compared": self.digests_compared,
            "recomputed_tokens": self.recomputed_tokens,
            "kv_bytes": self.kv_bytes,
            "transport": self.transport,
            "ttft_ms": {stage: round(self.ttft_ms[stage], 3) for stage in STAGES},
            "plain_ttft_ms": round(self.plain_ttft_ms, 3),
        }
