"""Public test tools: the conformance suite of transports, fault injection, simulation."""
