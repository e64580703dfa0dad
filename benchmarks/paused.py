"""Instances that only run while they are measured: the others must not take the processor from them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from pd_connector.demo.instance import Instance


def pause(*instances: Instance) -> None:
    _signal(instances, signal.SIGSTOP)


def wake(*instances: Instance) -> None:
    _signal(instances, signal.SIGCONT)


@contextlib.contextmanager
def running(*instances: Instance) -> Iterator[None]:
    wake(*instances)
    try:
        yield
    finally:
        pause(*instances)


def _signal(instances: tuple[Instance, ...], number: signal.Signals) -> None:
    for instance in instances:
        assert instance.process is not None
        os.killpg(instance.process.pid, number)
