"""The demo's parts on their own: processes that cannot outlive it, a model whose tokenizer takes any text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pd_connector.demo.instance import Instance, InstanceFailed, free_port
from pd_connector.demo.model import ModelShape, build_model

# A server whose child ignores SIGTERM, as an engine that is busy does.
STUBBORN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); "
                          "print('up', flush=True); time.sleep(300)"])
time.sleep(300)
"""
STARTER = """
import sys, time
from pathlib import Path
from pd_connector.demo.instance import Instance
instance = Instance("stubborn", [sys.executable, "-c", sys.argv[1]], 1, Path(sys.argv[2]))
instance.start()
print(instance.process.pid, flush=True)
time.sleep(300)
"""


def stubborn(log: Path) -> Instance:
    return Instance("stubborn", [sys.executable, "-c", STUBBORN], free_port(), log)


def wait_until_up(log: Path) -> None:
    deadline = time.monotonic() + 40
    while not log.exists() or "up" not in log.read_text():
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """Processes of a group that are more than zombies."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, timeout=20, check=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


def test_stop_leaves_nothing_of_the_group(tmp_path: Path) -> None:
    instance = stubborn(tmp_path / "log")
    instance.start()
    assert instance.process is not None
    assert instance.guard is not None
    group, guard = instance.process.pid, instance.guard
    wait_until_up(instance.log)
    assert len(members(group)) == 2
    instance.stop()
    assert members(group) == []
    assert guard.returncode is not None


def test_the_group_dies_with_whoever_started_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, STUBBORN, str(log)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    try:
        wait_until_up(log)
        assert len(members(group)) == 2
        starter.kill()
        starter.communicate(timeout=20)
        deadline = time.monotonic() + 20
        while members(group):
            assert time.monotonic() < deadline, "the group outlived its starter"
            time.sleep(0.05)
    finally:
        if members(group):
            os.killpg(group, signal.SIGKILL)


def test_a_process_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    instance = Instance(
        "short", [sys.executable, "-c", "print('no port here'); raise SystemExit(3)"], 1, tmp_path / "l"
    )
    instance.start()
    with pytest.raises(InstanceFailed, match=r"short ended with status 3(.|\n)*no port here"):
        instance.wait_ready(30)
    instance.stop()


def test_the_model_takes_any_text_and_is_built_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    shape = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, vocabulary=300)
    directory = build_model(tmp_path / "model", shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Hello, world: 你好"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < shape.words
    assert tokenizer.decode(ids) == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert build_model(directory, shape) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
