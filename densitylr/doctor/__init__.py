"""The doctor: run a training script unchanged, and report what is wrong with the network.

``python -m densitylr train.py --its --own --arguments`` runs the script, watches its models
learn without touching a number, and ends with a diagnosis: which stages learn, which do not,
on what evidence, and the lines that repair it.

Nothing here may import torch before the script has done so.
"""

from densitylr.doctor.cli import main

__all__ = ["main"]
