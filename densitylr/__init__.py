"""A network's own activation density runs its learning rates."""

from densitylr.stages import find_stages

__all__ = ["find_stages"]
