"""The study of ``docs/study.md``: its sweeps, their packed runs, its tables and its pictures."""

__all__: list[str] = []
