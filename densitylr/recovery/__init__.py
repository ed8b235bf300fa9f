"""Going back after a collapse: snapshots of healthy states, and a cap on the rates."""

from densitylr.recovery.recovery import Recovery

__all__ = ["Recovery"]
