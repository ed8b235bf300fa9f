"""What watching costs: a benchmark of training steps, and what can be counted of them."""

__all__: list[str] = []
