"""Finding the models and optimizers of a running script, and observing them.

Importing this imports torch: the script has done so by then.
"""

from densitylr.doctor.watch.discovery import ModelDiscovery
from densitylr.doctor.watch.observer import Observer, Trainer

__all__ = ["ModelDiscovery", "Observer", "Trainer"]
