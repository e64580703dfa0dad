"""``make rdma-test``: everything over real verbs, in guests with Soft-RoCE.

``--short`` is what a machine that judges a checkout has time for. Where no guest can be booted at all it says so loudly
and, with ``--or-skip``, ends well all the same.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from guest import Guest, pair, run
from image import Image, NoGuests, prepare

INSIDE = "tests/rdma_vm/inside"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "--tb=short", "--timeout=400"]
GPU = ["env", f"LD_LIBRARY_PATH={os.getcwd()}/build/verbs", *PYTEST, f"{INSIDE}/test_gpu.py"]
_SHORT = (
    "TestVerbsBetweenProcesses and (random_plan or killed)",
    "test_handover.py and ((prompt and read) or control)",
    "scattered or counters_can_fail",
    "a_key_that_is_wrong",
)
_STRESS = "build/stress-address,undefined"
_BANNER = "=" * 100


def short() -> list[tuple[str, list[list[str]], float]]:
    chosen = " or ".join(f"({words})" for words in _SHORT)
    both = f"{shlex.join([*PYTEST, INSIDE, '-k', chosen])} && {shlex.join([*GPU, '-k', 'alone or told_to_look'])}"
    return [("one guest, a choice", [["sh", "-c", both]], 900)]


def whole() -> list[tuple[str, list[list[str]], float]]:
    """(name, the command of each guest, seconds)."""
    other = [sys.executable, "-m", "tests.rdma_vm.inside.other"]
    across = ["env", "PDC_RDMA_OTHER=10.77.0.1", *PYTEST, f"{INSIDE}/test_across.py", f"{INSIDE}/test_handover.py"]
    quit_ = f"{sys.executable} -c 'from tests.rdma_vm.inside.other import ask; ask(\"quit\")'"
    said = " ".join(f"'{word}'" for word in across) + f"; rc=$?; PDC_RDMA_OTHER=10.77.0.1 {quit_}; exit $rc"
    plugin = ["env", "PDC_TEST_TRANSPORT=verbs", "PDC_TEST_PATIENCE=20", *PYTEST, "tests/plugin/test_handover.py"]
    return [
        ("the C code under the sanitizers", [[_STRESS, "verbs", "verbs-write"]], 600),
        (
            "one guest: hand-over, counters, failures",
            [[*PYTEST, INSIDE, "--deselect", f"{INSIDE}/test_conformance.py", "--deselect", f"{INSIDE}/test_gpu.py"]],
            1200,
        ),
        ("one guest: memory of an emulated GPU", [GPU], 5400),
        ("one guest: conformance", [[*PYTEST, f"{INSIDE}/test_conformance.py"]], 7200),
        ("two guests: conformance and hand-over", [other, ["sh", "-c", said]], 7200),
        ("one guest: the vLLM connector", [plugin], 3600),
    ]


def one(image: Image, name: str, commands: Sequence[Sequence[str]], seconds: float) -> str:
    """What became of a step, "" when all of it is well."""
    start = time.monotonic()
    print(f"{_BANNER}\nrdma-test: {name}", flush=True)

    def put(guest: Guest, line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    try:
        if len(commands) == 1:
            statuses = run(
                [Guest(image, commands[0], memory="6G" if "plugin" in str(commands) else "2G")], seconds, put
            )
        else:
            statuses = pair(image, commands[0], commands[1], seconds, put)
    except TimeoutError as error:
        return str(error)
    return "" if not any(statuses) else f"exit status {', '.join(map(str, statuses))}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="rdma-test", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a choice of the tests, in one guest")
    parser.add_argument("--or-skip", action="store_true", help="end well where no guest can be booted")
    parser.add_argument("--only", default="", metavar="WORDS", help="steps whose name has these words")
    options = parser.parse_args()
    if not options.short:
        subprocess.run(["make", "--no-print-directory", _STRESS], check=True)
    results = []
    try:
        image = prepare()
        subprocess.run([sys.executable, "-m", "tests.rdma_vm.inside.gpu"], check=True)  # a guest would take long
        for name, commands, seconds in short() if options.short else whole():
            if options.only in name:
                start = time.monotonic()
                results.append((name, one(image, name, commands, seconds), time.monotonic() - start))
    except NoGuests as error:
        print(
            f"{_BANNER}\nRDMA TESTS SKIPPED: no guest with Soft-RoCE can be booted here\n{error}\n{_BANNER}", flush=True
        )
        return 0 if options.or_skip else 125
    print(_BANNER)
    for name, found, seconds in results:
        print(f"rdma-test: {name}: {found or 'all well'} ({seconds:.0f} s)")
    return int(any(found for _, found, _ in results) or not results)


if __name__ == "__main__":
    sys.exit(main())
