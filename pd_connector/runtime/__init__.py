"""I/O around the protocol core: agents on asyncio, and a portal for synchronous engines."""
