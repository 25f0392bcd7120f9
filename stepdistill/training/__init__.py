"""Training: the loop over a method's updates, its checkpoints and its logs."""
from ..errors import Stopped
from .launch import launched
from .loop import Trainer
from .optimizers import TrainConfig

__all__ = ["Stopped", "TrainConfig", "Trainer", "launched"]
