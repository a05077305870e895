"""The method: what a training step feeds the network, and the loss it is given."""

from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

__all__ = ["Interpolation", "MixFlow", "mixflow_loss"]
