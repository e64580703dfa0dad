"""The demo: real vLLM instances, a router, and the proof that the decode side used the prefill side's blocks."""
