"""What is in ``inside`` needs an RDMA device: it runs in guests (``make rdma-test``), or on a host that has one."""

from __future__ import annotations

from pd_connector.transport.verbs import VerbsTransport

if VerbsTransport.probe({}) is not None:
    collect_ignore = ["inside"]
