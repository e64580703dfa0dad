"""``pdc doctor``: what works on this host, and between it and a peer, found by trying it."""
