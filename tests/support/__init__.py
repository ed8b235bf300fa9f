"""What tests of several folders use: small nets and their batches, readings by hand, hosts."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository, with README.md, conf and examples."""
