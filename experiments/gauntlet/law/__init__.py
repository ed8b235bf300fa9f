"""The tables and the figure of ``docs/law.md``, computed from the committed records."""

from experiments.gauntlet.law.tables import README_TABLES, TABLES

__all__ = ["README_TABLES", "TABLES"]
