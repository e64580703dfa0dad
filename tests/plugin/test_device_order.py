"""A device that is still at work: nothing of a launched forward is offered, no block is read into. With the emulated
NPU only ($PDC_TEST_DEVICE); not run on hardware."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .engine import BLOCK, reference
from .pair import PREFILL, Pair, words
from .test_streams import CHUNK, PROMPT, Streamed, preempt, usable

pytestmark = pytest.mark.skipif(os.environ.get("PDC_TEST_DEVICE") != "npu", reason="host memory knows no such order")


@pytest.fixture
def busy() -> Iterator[threading.Event]:
    """The device is at work from now on, until this is set."""
    from tests.ascend_emulated.torch_npu import Event

    held = Event.busy = threading.Event()
    yield held
    held.set()
    Event.busy = None


def stepped(*engines: Any, seconds: float = 1.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for engine in engines:
            engine.step()


def test_a_launched_chunk_is_not_offered(engine: Callable[..., Any], busy: threading.Event) -> None:
    pair = Streamed(engine("kv_producer", budget=CHUNK), engine("kv_consumer", {"audit": True}))
    prompt = words(6 * CHUNK)
    pair.begin("r", prompt)
    request = pair.prefill.scheduler.requests["r"]
    while request.num_computed_tokens < 2 * CHUNK:
        pair.prefill.step()
    stepped(pair.decode)
    assert usable(pair.decode) == 0
    busy.set()
    pair.decode.until(lambda: usable(pair.decode) >= 2 * CHUNK)
    pair.answered("r", prompt)
    pair.settle()


def test_blocks_are_not_read_into_before_the_device_has_left_them(
    engine: Callable[..., Any], busy: threading.Event
) -> None:
    pair = Pair(engine("kv_producer"), engine("kv_consumer", {"audit": True}))
    prompt = words(5 * BLOCK + 3)
    busy.set()
    pair.prefill.add("r", prompt, params=PREFILL)
    pair.until(lambda: "r" in pair.prefill.ended)
    busy.clear()
    before = pair.decode.words.clone()
    pair.decode.add("d", prompt, tokens=3, params=pair.prefill.params["r"])
    stepped(pair.prefill, pair.decode)
    assert bool((pair.decode.words == before).all())
    assert pair.decode.transfers == []
    busy.set()
    pair.until(lambda: "d" in pair.decode.ended)
    assert pair.decode.tokens["d"] == reference(prompt, 3)
    pair.settle()


def test_an_epoch_that_ended_meanwhile_is_not_offered(engine: Callable[..., Any], busy: threading.Event) -> None:
    """A launched chunk's request is preempted and its blocks are another's before the device is done with it."""
    from tests.ascend_emulated.torch_npu import Event

    pair = Streamed(engine("kv_producer", budget=CHUNK, blocks=32), engine("kv_consumer", {"audit": True}))
    prompt = words(PROMPT)
    pair.begin("r", prompt)
    pair.prefill.step()
    assert pair.prefill.scheduler.requests["r"].num_computed_tokens
    Event.busy = None  # what is launched from now on is done at once
    preempt(pair.prefill, "r")
    waiting = pair.prefill.scheduler.waiting
    waiting.remove_request(request := pair.prefill.scheduler.requests["r"])
    pair.prefill.add("squatter", words(30 * BLOCK, 7))
    waiting.add_request(request)
    pair.prefill.step()  # ends the epoch; the squatter writes to the old blocks
    busy.set()
    stepped(pair.decode)
    assert usable(pair.decode) == 0
    pair.answered("r", prompt)
    pair.settle()
