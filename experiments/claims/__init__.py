"""What the README claims, and the runs behind it."""

from experiments.claims.check import Claim, claims

__all__ = ["Claim", "claims"]
