"""The limit of a read within this host: scattered copies, in a process of its own so that nothing of ours is in it.

Run as a module it prints t1, t2 (memcpy by one and two threads) and nt1, nt2 (the same with streaming stores) in GB/s.
"""

from __future__ import annotations

import json
import subprocess
import sys

from pd_connector.errors import TransferFailed
from pd_connector.memory import native

DEADLINE_S = 60.0
NAMES = ("t1", "t2", "nt1", "nt2")


def memory_limits(chunk_bytes: int, chunks: int, *, huge: bool) -> dict[str, float]:
    """GB/s by name, now; empty where there is no C extension to measure them with. Takes about a second."""
    if native() is None:
        return {}
    command = [sys.executable, "-m", __name__, str(chunk_bytes), str(chunks), str(int(huge))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    except subprocess.SubprocessError as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise TransferFailed(f"the limit of {chunks} chunks of {chunk_bytes} bytes was not measured: {why}") from None
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    extension = native()
    if extension is None:
        sys.exit("the C extension is not built")
    print(json.dumps(dict(zip(NAMES, extension.limits(*map(int, sys.argv[1:4])), strict=True))))
