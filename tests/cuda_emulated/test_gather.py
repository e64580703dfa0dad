"""The kernel does what it is for, by an interpreter of its PTX, and NVIDIA's assembler takes it, where there is one.
Not run on hardware."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest

from .ptx import Machine, kernel

BASE, SIZE, LIST = 0x7F0000000000, 1 << 16, 1 << 12


def ptxas() -> str | None:
    beside = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    return shutil.which("ptxas") or (str(beside) if beside.exists() else None)


def gathered(moves: list[tuple[int, int, int]], blocks: int = 2, threads: int = 64) -> Machine:
    """Of (destination, source, bytes) as offsets: every byte of memory is what it must be afterwards."""
    memory = bytearray(random.Random(1).randbytes(SIZE))
    for index, (dst, src, size) in enumerate(moves):
        struct.pack_into("=3Q", memory, index * 24, BASE + dst, BASE + src, size)
    expected = bytearray(memory)
    for dst, src, size in moves:
        expected[dst : dst + size] = memory[src : src + size]
    machine = Machine(memory, BASE)
    machine.launch(BASE, len(moves), blocks, threads)
    assert machine.memory == expected
    return machine


@pytest.mark.parametrize("size", [0, 1, 3, 4, 15, 16, 17, 31, 64, 127, 511, 512, 513, 1024, 1100])
@pytest.mark.parametrize(("dst", "src"), [(0, 0), (16, 32), (4, 8), (8, 4), (1, 0), (0, 1), (2, 6), (3, 3)])
def test_every_size_and_alignment(size: int, dst: int, src: int) -> None:
    machine = gathered([(LIST + dst, 2 * LIST + src, size)], 1, 32)
    sixteens, fours = size // 16, size // 4
    if (dst | src) % 16 == 0:
        assert machine.used["ld.global.v4.u32"] == sixteens
    elif (dst | src) % 4 == 0:
        assert machine.used["ld.global.u32"] == fours
    else:
        assert machine.used["ld.global.u8"] == size


@pytest.mark.parametrize("count", [1, 3, 4, 5, 40])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (2, 64), (5, 96)])
def test_as_many_moves_as_there_are_by_as_many_warps(count: int, blocks: int, threads: int) -> None:
    rng, moves, at = random.Random(count), [], LIST
    for _ in range(count):
        size, at = rng.choice((16, 48, 100, 333)), at + rng.choice((0, 1, 4, 16))
        moves.append((at, SIZE // 2 + rng.randrange(SIZE // 2 - size), size))
        at += size
    gathered(moves, blocks, threads)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90"])
def test_the_assembler_takes_it(target: str, tmp_path: Path) -> None:
    assembler = ptxas()
    if assembler is None:
        pytest.skip("NO PTXAS: the kernel is not assembled here (pip install nvidia-cuda-nvcc-cu12 brings it)")
    (tmp_path / "gather.ptx").write_text(kernel())
    command = [assembler, "-v", "-Werror", "--gpu-name", target, "gather.ptx", "-o", "gather.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
