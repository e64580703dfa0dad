"""``pdc demo``: real vLLM prefills in one process, another one decodes from its blocks, and a table proves it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pd_connector.demo.deployment import Deployment
from pd_connector.demo.instance import InstanceFailed, vllm_available
from pd_connector.demo.interrupts import Interrupts
from pd_connector.demo.measure import Bench, chosen_transport
from pd_connector.demo.model import SMALL, build_model
from pd_connector.demo.prompts import LONGEST, PROMPT_TOKENS, random_prompts
from pd_connector.demo.report import Progress, as_json, proof, times, verdict
from pd_connector.demo.verdict import Row
from pd_connector.errors import ConfigError

DEADLINE_S = 540.0
"""For everything up to the verdict: a demo that takes longer does not run here."""
PASS, FAIL = 0, 1
_KEEP_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """``workdir`` keeps model and logs; without one there is a temporary directory, which goes with
    the demo unless it could not run or ``keep`` is set."""

    prompts: tuple[int, ...] = PROMPT_TOKENS
    workdir: Path | None = None
    seed: int = 0
    keep: bool = False
    json: bool = False
    wrong_byte: bool = False
    deadline: float = DEADLINE_S

    def __post_init__(self) -> None:
        wrong = [length for length in self.prompts if not 1 <= length <= LONGEST]
        if wrong or not self.prompts:
            raise ConfigError(f"--prompts: lengths from 1 to {LONGEST} tokens, separated by commas; {wrong} is none")
        if not 1 <= self.deadline <= 86400:
            raise ConfigError(f"--deadline {self.deadline:g}: choose 1 to 86400 seconds")


def run(options: Options) -> int:
    """PASS or FAIL. Raises InstanceFailed or ConfigError when the demo could not run, KeyboardInterrupt when it was
    told to stop; whatever happens, no process is left."""
    if not vllm_available():
        raise ConfigError("no vllm can be imported here; 'make venv' installs one, or pip install vllm")
    # In --json mode stdout belongs to the one object.
    console = Console(stderr=options.json)
    with Interrupts() as interrupts, _directory(options) as directory:
        progress = Progress(console)
        try:
            return _run(options, directory, console, progress, interrupts)
        finally:
            progress.close()


def _run(options: Options, directory: Path, console: Console, progress: Progress, interrupts: Interrupts) -> int:
    started = time.monotonic()
    deadline = started + options.deadline
    progress.waiting("building a small model with random weights")
    model = build_model(directory / "model", SMALL)
    interrupts.check()
    progress.step(f"model: {SMALL.layers} layers, {SMALL.kv_bytes_per_token} bytes of KV per token, in {directory}")
    deployment = Deployment(model, directory, wrong_byte=options.wrong_byte, interrupts=interrupts)
    try:
        deployment.start(deadline, progress.waiting)
        deployment.warm_up(deadline, progress.waiting)
        progress.step(f"prefill, decode and router are up after {time.monotonic() - started:.0f} s")
        rows = _measure(options, deployment, deadline, progress)
        interrupts.check()
        _show(options, rows, deployment, console)
        if options.keep:
            _keep(deployment, console, interrupts)
        return PASS if verdict(rows) == "pass" else FAIL
    finally:
        with contextlib.suppress(KeyboardInterrupt), interrupts.held():
            progress.waiting("stopping")
            deployment.stop()


def _measure(options: Options, deployment: Deployment, deadline: float, progress: Progress) -> list[Row]:
    bench = Bench(deployment, timeout=max(1.0, deadline - time.monotonic()))
    rows = []
    for prompt in random_prompts(options.prompts, SMALL.words, options.seed):
        progress.waiting(f"prompt of {len(prompt)} tokens: through P and D, then plain on P")
        rows.append(bench.measure(prompt))
        deployment.check()
        progress.step(f"{len(prompt)} tokens: {'; '.join(rows[-1].complaints()) or 'pass'}")
    return rows


def _show(options: Options, rows: list[Row], deployment: Deployment, console: Console) -> None:
    transport, reasons = chosen_transport(deployment.decode.log)
    console.print(proof(rows), times(rows), sep="")
    console.print(f"D reads from P over {transport} ({reasons})", markup=False, highlight=False, soft_wrap=True)
    console.print(f"verdict: {verdict(rows)}", highlight=False)
    if options.json:
        print(as_json(rows), flush=True)


def _keep(deployment: Deployment, console: Console, interrupts: Interrupts) -> None:
    """Until Ctrl-C. Raises InstanceFailed when a process ends by itself."""
    body = '{"model": "demo", "prompt": "Hello", "max_tokens": 16, "stream": true}'
    line = f"curl -N {deployment.router.url}/v1/completions -H 'content-type: application/json' -d '{body}'"
    console.print(f"\nstill running, Ctrl-C stops it; try\n  {line}", markup=False, highlight=False, soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            deployment.check()
            interrupts.check()
            time.sleep(_KEEP_POLL_S)


@contextlib.contextmanager
def _directory(options: Options) -> Iterator[Path]:
    if options.workdir is not None:
        try:
            options.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir {options.workdir} cannot be used: {error}") from None
        yield options.workdir.resolve()
        return
    directory, remove = Path(tempfile.mkdtemp(prefix="pdc-demo-")), not options.keep
    try:
        yield directory
    except InstanceFailed as error:
        remove = False
        raise InstanceFailed(f"{error}\nall logs are in {directory}") from None
    finally:
        if remove:
            shutil.rmtree(directory, ignore_errors=True)
