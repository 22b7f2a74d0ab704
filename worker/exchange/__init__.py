"""The exchange: how the workers' gradients become their average.

An exchange has one operation, `average`; `ps` does it over gRPC with parameter servers.
"""
