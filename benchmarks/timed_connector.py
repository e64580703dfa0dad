"""PDConnector that counts the time inside its hooks, for bench_prefill.py.

Each process keeps one file in the folder PDC_TIMES: eight bytes each of seconds inside hooks, less what an idle step
waits there on purpose, and then the ids of our threads.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pd_connector.vllm_plugin import PDConnector

HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "handle_preemptions",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
)
MOST_THREADS = 64
_seconds = 0.0
_page: mmap.mmap | None = None


def _open() -> mmap.mmap:
    path = Path(os.environ["PDC_TIMES"]) / str(os.getpid())
    size = 8 * (1 + MOST_THREADS)
    path.write_bytes(bytes(size))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size)


def _our_threads() -> list[int]:
    """Those that Python knows by our names, and ZeroMQ's, also the ones that are vLLM's own: rather too many."""
    ours = [thread.native_id or 0 for thread in threading.enumerate() if thread.name.startswith(("pdc", "pd-"))]
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().startswith(("ZMQbg/IO", "pd-")):
            ours.append(int(task.name))
    return ours[:MOST_THREADS]


def _timed(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _seconds, _page
        waits = self._worker is not None and self._worker._idle
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        finally:
            if not waits:
                _seconds += time.perf_counter() - start
            if _page is None:
                _page = _open()
            struct.pack_into("<d", _page, 0, _seconds)
            if hook.__name__ == "on_new_request" or (hook.__name__ == "handle_preemptions" and not waits):
                threads = _our_threads()
                struct.pack_into(f"<{MOST_THREADS}Q", _page, 8, *threads, *[0] * (MOST_THREADS - len(threads)))

    return run


class TimedConnector(PDConnector):
    pass


for _name in HOOKS:
    setattr(TimedConnector, _name, _timed(getattr(PDConnector, _name)))
