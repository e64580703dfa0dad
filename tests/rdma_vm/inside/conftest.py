"""An emulated machine is slow: what has 20 s elsewhere has two minutes here."""

from __future__ import annotations

from pd_connector.testing import conformance, owner_process, pair

owner_process.ANSWER_S = pair.DEADLINE_S = conformance.DEADLINE_S = 120.0
