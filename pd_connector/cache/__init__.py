"""The multi-level KV cache: what identifies cached KV, and where it lies."""
