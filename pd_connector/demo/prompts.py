"""What is asked: lengths on both sides of every block boundary, and token ids that no cache can have seen."""

from __future__ import annotations

import random

PROMPT_TOKENS = (1, 31, 128, 129, 1000, 3000)
"""One token, part of a block, exactly vLLM's usual CPU block of 128, one token more, several blocks, many blocks."""
OUTPUT_TOKENS = 16
LONGEST = 8000
"""Bound on a prompt, so that it and its answer fit the model's length."""


def random_prompts(lengths: tuple[int, ...], vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids below ``vocabulary``. Every prompt is random from its first token on, so none shares a block with
    another one, and whatever D does not read from P it has to compute."""
    dice = random.Random(seed)
    return [[dice.randrange(vocabulary) for _ in range(length)] for length in lengths]
