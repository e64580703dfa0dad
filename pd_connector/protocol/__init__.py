"""Sans-IO protocol core: no sockets, no clock, no threads, no asyncio."""
