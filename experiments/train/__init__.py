"""Training: one arm, or a sweep of them, each run into a folder of its own.

Other packages use what lies inside: `tasks` (data and networks), `arms` (rates, optimizers,
controllers, rivals) and `runs` (the folders, read back).
"""

__all__: list[str] = []
