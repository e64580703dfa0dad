"""Every form in which vllm-ascend hands KV caches to a connector, from ranks to ranks of other numbers, byte by byte.

Not run on hardware: the tensors are real torch tensors of an emulated device "npu" whose memory is the host's; the
forms, the plans and the copies are checked, no kernel and no driver is. Beside them is a gather that knows of neither
layouts nor plans: it moves one token of one head after the other through torch's own indexing.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from pd_connector.errors import ConfigError, LayoutMismatch  # noqa: E402
from pd_connector.memory import MemoryKind  # noqa: E402
from pd_connector.ranks import duties, shares  # noqa: E402
from pd_connector.reshard import Resharding  # noqa: E402
from pd_connector.vllm_plugin import compat  # noqa: E402

from . import torch_npu  # noqa: E402
from .carrier import carry, transport_for  # noqa: E402
from .forms import ALIGNMENT, KERNEL, KINDS, POISON, Kind, Rank, attention_rank, hybrid_rank  # noqa: E402

BLOCKS = 6
TOKENS = 2 * KERNEL + 37
SRC, DST = [4, 0, 3], [1, 5, 2]
"""Blocks of 128 tokens in which the owner has a prompt, and the reader wants it."""


@pytest.fixture(autouse=True)
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        torch_npu.load()
    except torch_npu.Unavailable as reason:
        pytest.skip(f"NPU TENSORS ARE NOT CHECKED: {reason}")
    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(device_type="npu"))


def logical(kind: Kind, seed: int = 0) -> dict[str, list[Any]]:
    """What the model holds: per layer and content (tokens, all heads, bytes of the head)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.self_attn.attn": [
            torch.randint(
                0, 256, (TOKENS, kind.heads if each.divided else 1, each.size * each.dtype.itemsize),
                dtype=torch.uint8, generator=generator,
            )
            for each in kind.contents
        ]
        for layer in range(kind.layers)
    }  # fmt: skip


def place(token: int, blocks: Sequence[int], block_tokens: int) -> tuple[int, int]:
    """The kernel's block and the row in it."""
    first = blocks[token // block_tokens] * (block_tokens // KERNEL)
    return first + token % block_tokens // KERNEL, token % KERNEL


def write(
    rank: Rank, kv: dict[str, list[Any]], blocks: Sequence[int], first: int, last: int, block_tokens: int
) -> None:
    for name, contents in kv.items():
        for tensor, values in zip(rank.tensors[name], contents, strict=True):
            for token in range(first, last):
                at = place(token, blocks, block_tokens)
                for head in range(tensor.shape[2]):
                    value = values[token, (rank.first_head + head) % values.shape[1]]
                    tensor[at[0], at[1], head].copy_(value.view(tensor.dtype))


def pull(owners: Sequence[Rank], reader: Rank, readers: Sequence[Rank], jobs: Sequence[tuple[Any, ...]]) -> None:
    """What one reader rank reads. ``jobs``: (group, source blocks, own blocks, first token, last)."""
    layouts = [rank.layout for rank in owners]
    duties(reader.layout.rank, [rank.layout for rank in readers], layouts)
    carrier = transport_for(reader.regions[0].kind)
    for number, share in shares(reader.layout, layouts).items():
        resharding = Resharding(reader.layout, layouts[number], share)
        plans = [plan for job in jobs for plan in resharding.plan(*job)]
        carry(carrier, plans, owners[number].regions, reader.regions)


def hand_over(
    kind: Kind, tps: tuple[int, int], first: int = 0, last: int = TOKENS, sizes: tuple[int, int] = (KERNEL, KERNEL)
) -> tuple[list[Rank], list[Rank], list[list[Any]]]:
    """(owners, readers after the transfer, what each reader's allocations must hold)."""
    kv = logical(kind)
    ids = [[block * KERNEL // size for block in range(6)] if size > KERNEL else None for size in sizes]
    src, dst = ([2, 0] if size > KERNEL else given for size, given in zip(sizes, (SRC, DST), strict=True))
    owners, readers = (
        [attention_rank(kind, tp, rank, BLOCKS, size) for rank in range(tp)] for tp, size in zip(tps, sizes, strict=True)
    )
    assert ids is not None
    for owner in owners:
        write(owner, kv, src, 0, TOKENS, sizes[0])
    expected = []
    for rank in range(tps[1]):
        naive = attention_rank(kind, tps[1], rank, BLOCKS, sizes[1])
        write(naive, kv, dst, first, last, sizes[1])
        expected.append(naive.snapshot())
    for reader in readers:
        pull(owners, reader, readers, [(0, src, dst, first, last)])
    return owners, readers, expected


def same(ranks: Sequence[Rank], expected: Sequence[Sequence[Any]]) -> bool:
    """Every byte of every allocation, those that nothing was to be written to included. Their addresses differ, and
    with them what lies before the aligned tensors: that is compared as well, since it is of equal length."""
    return all(
        all(map(torch.equal, rank.snapshot(), wanted)) for rank, wanted in zip(ranks, expected, strict=True)
    )


TPS = [(1, 1), (2, 2), (4, 2), (4, 1), (2, 1), (1, 2), (2, 4), (1, 4)]


@pytest.mark.parametrize("tps", TPS, ids=lambda tps: f"P{tps[0]} D{tps[1]}")
@pytest.mark.parametrize("name", KINDS)
def test_bytes_arrive_where_they_belong(name: str, tps: tuple[int, int]) -> None:
    _, readers, expected = hand_over(KINDS[name], tps)
    assert same(readers, expected)
