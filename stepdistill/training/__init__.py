"""Training: the loop over a method's updates, its checkpoints and its logs."""
from .launch import launched
from .loop import Trainer
from .optimizers import TrainConfig
from .stopping import Stopped

__all__ = ["Stopped", "TrainConfig", "Trainer", "launched"]
