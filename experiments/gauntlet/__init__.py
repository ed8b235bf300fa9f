"""The gauntlet: the policies on ten small networks, three optimizers and many faults."""

__all__: list[str] = []
