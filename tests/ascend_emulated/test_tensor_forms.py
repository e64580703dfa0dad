"""Every form in which vllm-ascend hands KV caches to a connector, from ranks to ranks of other numbers, byte by byte.

Not run on hardware: the tensors are real torch tensors of an emulated device "npu" whose memory is the host's; the
forms, the plans and the copies are checked, no kernel and no driver is. Beside them is a gather that knows of neither
layouts nor plans: it puts one head after the other into its place through torch's own indexing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from pd_connector.errors import ConfigError, LayoutMismatch  # noqa: E402
from pd_connector.memory import MemoryKind  # noqa: E402
from pd_connector.ranks import duties  # noqa: E402
from pd_connector.reshard import Resharding  # noqa: E402
from pd_connector.vllm_plugin import compat  # noqa: E402

from . import torch_npu  # noqa: E402
from .carrier import carry, transport_for  # noqa: E402
from .forms import ALIGNMENT, BF16, INT8, KERNEL, KINDS, Content, Kind, Rank, attention_rank, hybrid_rank  # noqa: E402

BLOCKS = 6
"""Of 128 tokens; half as many of 256."""
TOKENS = 2 * KERNEL + 37
IDS = {KERNEL: ([4, 0, 3], [1, 5, 2]), 2 * KERNEL: ([2, 0], [1, 2])}
"""Per block size the blocks in which the owner has a prompt, and in which the reader wants it."""
KV = dict[str, list[Any]]


@pytest.fixture(autouse=True)
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        torch_npu.load()
    except torch_npu.Unavailable as reason:
        pytest.skip(f"NPU TENSORS ARE NOT CHECKED: {reason}")
    monkeypatch.setattr(compat, "current_platform", SimpleNamespace(device_type="npu"))


def logical(kind: Kind) -> KV:
    """What the model holds: per layer and content (all heads, tokens, bytes of a token and head)."""
    generator = torch.Generator().manual_seed(1)
    heads = [kind.heads if each.divided else 1 for each in kind.contents]
    sizes = [each.size * each.dtype.itemsize for each in kind.contents]
    return {
        f"model.layers.{layer}.self_attn.attn": [
            torch.randint(0, 256, (count, TOKENS, size), dtype=torch.uint8, generator=generator)
            for count, size in zip(heads, sizes, strict=True)
        ]
        for layer in range(kind.layers)
    }


def write(rank: Rank, number: int, tp: int, kv: KV, blocks: Sequence[int], first: int, last: int, size: int) -> None:
    """Put tokens ``first`` to ``last - 1`` where rank ``number`` of ``tp`` has them; ``size``: tokens of a block."""
    for name, contents in kv.items():
        for tensor, values in zip(rank.tensors[name], contents, strict=True):
            for head in range(tensor.shape[2]):
                of_model = (number * len(values) // tp + head) % len(values)
                for start in range(first // KERNEL * KERNEL, last, KERNEL):
                    low, high = max(first, start), min(last, start + KERNEL)
                    kernel_block = blocks[start // size] * (size // KERNEL) + start % size // KERNEL
                    rows = values[of_model, low:high].contiguous().view(tensor.dtype)
                    tensor[kernel_block, low - start : high - start, head].copy_(rows)


def ranks_of(kind: Kind, tp: int, size: int) -> list[Rank]:
    return [attention_rank(kind, tp, rank, BLOCKS * KERNEL // size, size) for rank in range(tp)]


def pull(owners: Sequence[Rank], readers: Sequence[Rank], jobs: Sequence[tuple[Any, ...]]) -> None:
    """What every reader rank reads. ``jobs``: (group, source blocks, own blocks, first token, last)."""
    layouts = [rank.layout for rank in owners]
    for reader in readers:
        duty = duties(reader.layout.rank, [rank.layout for rank in readers], layouts)
        carrier = transport_for(reader.regions[0].kind)
        for number, share in duty.shares.items():
            resharding = Resharding(reader.layout, layouts[number], share)
            plans = [plan for job in jobs for plan in resharding.plan(*job)]
            carry(carrier, plans, owners[number].regions, reader.regions)


def hand_over(
    kind: Kind, tps: tuple[int, int], first: int = 0, last: int = TOKENS, sizes: tuple[int, int] = (KERNEL, KERNEL)
) -> tuple[list[Rank], list[list[bytes]]]:
    """(readers after the transfer, what each one's allocations must hold by the naive way)."""
    kv, (src, dst) = logical(kind), (IDS[sizes[0]][0], IDS[sizes[1]][1])
    owners, readers, naive = (
        ranks_of(kind, tp, size) for tp, size in zip((*tps, tps[1]), (*sizes, sizes[1]), strict=True)
    )
    for number, owner in enumerate(owners):
        write(owner, number, tps[0], kv, src, 0, TOKENS, sizes[0])
    for number, rank in enumerate(naive):
        write(rank, number, tps[1], kv, dst, first, last, sizes[1])
    pull(owners, readers, [(0, src, dst, first, last)])
    return readers, [rank.snapshot() for rank in naive]


def same(ranks: Sequence[Rank], expected: list[list[bytes]]) -> bool:
    """Every byte of every allocation, those included that nothing may be written to."""
    return [rank.snapshot() for rank in ranks] == expected


def rarely(*values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def words(value: Any) -> str:
    return f"P{value[0]} D{value[1]}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("tps", [(4, 2), (2, 4), *rarely((2, 2), (4, 1), (1, 4), (8, 2), (1, 8))], ids=words)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_arrive_where_they_belong(name: str, tps: tuple[int, int]) -> None:
    """Whatever the numbers of ranks, more than there are heads included; a latent is read from one of its replicas."""
    assert same(*hand_over(KINDS[name], tps))


@pytest.mark.parametrize("sizes", [(128, 256), *rarely((256, 128), (256, 256))], ids=words)
@pytest.mark.parametrize("tps", [(4, 2), (2, 4), (1, 1)], ids=words)
@pytest.mark.parametrize("name", ["k and v", "sparse, quantised"])
def test_blocks_of_several_kernel_blocks(name: str, tps: tuple[int, int], sizes: tuple[int, int]) -> None:
    """The scheduler's block may be several of the kernel's: (blocks x 2, 128, heads, size)."""
    assert same(*hand_over(KINDS[name], tps, sizes=sizes))


@pytest.mark.parametrize(("first", "last"), [(130, 200), (128, 256), (0, 1), (100, TOKENS)])
@pytest.mark.parametrize("name", ["v of another size", "sparse, quantised", "compressed"])
def test_parts_of_a_prompt(name: str, first: int, last: int) -> None:
    assert same(*hand_over(KINDS[name], (4, 2), first, last))
    assert same(*hand_over(KINDS[name], (2, 4), first, last, (256, 128) if name != "compressed" else (128, 128)))


@pytest.mark.parametrize("name", KINDS)
def test_regions_are_what_a_device_can_register(name: str) -> None:
    """One per allocation, aligned as the model runner aligned it, of the tensors' bytes and no others."""
    kind = KINDS[name]
    rank = attention_rank(kind, 1, 0, BLOCKS)
    tensors = [tensor for layer in rank.tensors.values() for tensor in layer]
    assert len(rank.regions) == len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(rank.raw)
    assert {region.kind for region in rank.regions} == {MemoryKind.NPU}
    assert all(region.address % ALIGNMENT == 0 for region in rank.regions)
    assert sum(region.length for region in rank.regions) == sum(tensor.nbytes for tensor in tensors)
    starts = {region.address + grid.offset for region in rank.regions for grid in region.grids}
    assert starts == {tensor.data_ptr() for tensor in tensors}


# --- one raw buffer for groups of several kinds -----------------------------------------------------------------------


def fill(tensor: Any, blocks: Sequence[int], seed: int) -> None:
    """Whole blocks of the scheduler, whose kernel blocks follow each other."""
    bytes_of = torch.randint(
        0, 256, (len(blocks), tensor.nbytes // HYBRID_BLOCKS), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    each = tensor.shape[0] // HYBRID_BLOCKS
    for block, values in zip(blocks, bytes_of, strict=True):
        rows = tensor[block * each : (block + 1) * each]
        rows.copy_(values.view(tensor.dtype).view(rows.shape))


HYBRID_BLOCKS = 8


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("size", [KERNEL, 2 * KERNEL])
def test_states_and_tokens_in_one_raw_buffer(tp: int, size: int) -> None:
    """The bytes that are K of one block are a state of another: both arrive, and nothing between them is touched."""
    token_ids, state_ids = ([6, 1], [0, 7]), ([3], [5])
    owners, readers, naive = ([hybrid_rank(tp, n, HYBRID_BLOCKS, size) for n in range(tp)] for _ in range(3))
    for side, ranks in ((0, owners), (1, naive)):
        for number, rank in enumerate(ranks):
            attention, states = rank.tensors.values()
            for part, tensor in enumerate((*attention, *states)):
                fill(tensor, token_ids[side] if part < 2 else state_ids[side], 10 * number + part)
    pull(owners, readers, [(0, *token_ids, 0, 2 * size), (1, *state_ids, 0, 1)])
    assert same(readers, [rank.snapshot() for rank in naive])
    assert all(len(rank.regions) == 1 and rank.regions[0].address % ALIGNMENT == 0 for rank in readers)


def test_states_cannot_be_divided_anew() -> None:
    """A state's inner axes are not known here: instances of unlike sizes refuse each other in words."""
    owners = [hybrid_rank(2, n, HYBRID_BLOCKS, KERNEL) for n in range(2)]
    readers = [hybrid_rank(1, 0, HYBRID_BLOCKS, KERNEL)]
    with pytest.raises(LayoutMismatch, match="divided among"):
        pull(owners, readers, [(0, [0], [0], 0, KERNEL)])


# --- what must not pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_comparison_sees_one_wrong_byte_anywhere(name: str) -> None:
    """Control: in every tensor, also where nothing was to be written."""
    readers, expected = hand_over(KINDS[name], (2, 1))
    assert same(readers, expected)
    for tensor in readers[0].tensors["model.layers.1.self_attn.attn"]:
        for block in (IDS[KERNEL][1][0], 0):
            element = tensor[block, 5, 0, :1].view(torch.uint8)
            before = element[:1].cpu().clone()
            element[:1].copy_(before ^ 1)
            assert not same(readers, expected)
            element[:1].copy_(before)
    assert same(readers, expected)


def test_the_comparison_sees_other_heads() -> None:
    """Control: the right bytes, of another rank."""
    readers, expected = hand_over(KINDS["k and v"], (1, 2))
    assert same(readers, expected)
    assert not same(readers[::-1], expected)


def test_types_of_one_size_are_told_apart() -> None:
    """int8 is not float8, whatever the cache as a whole is made of."""
    ours = KINDS["sparse, quantised"]
    contents = (*ours.contents[:2], replace(ours.contents[2], dtype=torch.float8_e4m3fn), ours.contents[3])
    owner = attention_rank(replace(ours, contents=contents), 1, 0, BLOCKS)
    reader = attention_rank(ours, 1, 0, BLOCKS)
    assert reader.layout.diff(owner.layout) == [
        "group 0 latent.2 is packed as: ours 128 bytes per 1 token (int8), theirs 128 bytes per 1 token (float8_e4m3fn)"
    ]


def test_another_number_of_tensors_is_refused() -> None:
    reader = attention_rank(KINDS["sparse, quantised"], 1, 0, BLOCKS)
    for name in ("latent", "sparse"):
        assert "blocks hold" in reader.layout.diff(attention_rank(KINDS[name], 1, 0, BLOCKS).layout)[0]


def test_quantised_and_plain_caches_refuse_each_other() -> None:
    plain = attention_rank(Kind((Content(64, BF16, True),) * 2, heads=2), 1, 0, BLOCKS)
    small = attention_rank(Kind((Content(64, INT8, True),) * 2, heads=2), 1, 0, BLOCKS)
    assert any("dtype" in line for line in plain.layout.diff(small.layout))


def test_tensors_that_do_not_begin_with_the_blocks_are_refused() -> None:
    """(2, blocks, ...) of older kernels, say: ids would lead to other bytes, or outside."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from .forms import describe

    spec = FullAttentionSpec(block_size=KERNEL, num_kv_heads=1, head_size=64, dtype=BF16)
    config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    tensor = torch.empty((2, BLOCKS, KERNEL, 1, 64), dtype=BF16, device="npu")
    with pytest.raises(ConfigError, match="does not begin with the 6 blocks"):
        describe(config, {"layer": tensor}, 1, 0, 1)


def test_no_library_of_the_device_is_imported_for_its_tensors() -> None:
    """Tensors say all there is to know; torch-npu is the engine's affair."""
    attention_rank(KINDS["k and v"], 1, 0, BLOCKS)
    assert "torch_npu" not in sys.modules


ADOPTING = r"""
#include <stdio.h>
#include <stddef.h>
int emu_adopt(void *address, size_t bytes) { printf("adopt %p %zu\n", address, bytes); fflush(stdout); return 0; }
int emu_disown(void *address) { printf("disown %p\n", address); fflush(stdout); return 0; }
"""
ALLOCATE = """
import ctypes, importlib.util, sys
ctypes.CDLL(sys.argv[2])
spec = importlib.util.spec_from_file_location("device", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.load()
import torch
tensor = torch.empty(3, device="npu")
print("at", hex(tensor.data_ptr()))
del tensor
"""


def test_an_emulated_runtime_is_told_of_device_memory(tmp_path: Path) -> None:
    """A libascendcl.so that is loaded already; without one there is nobody to tell."""
    library = tmp_path / "libascendcl.so"
    (tmp_path / "adopting.c").write_text(ADOPTING)
    build = ["cc", "-shared", "-fPIC", "-Wl,-soname,libascendcl.so", str(tmp_path / "adopting.c"), "-o", str(library)]
    subprocess.run(build, check=True, timeout=60)
    order = [sys.executable, "-c", ALLOCATE, torch_npu.__file__, str(library)]
    done = subprocess.run(order, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    adopted, at, disowned = (line.split() for line in done.stdout.splitlines())
    assert adopted == ["adopt", at[1], str(ALIGNMENT)]
    assert disowned == ["disown", at[1]]
