"""The method: the input of the network in a training step, and the loss of its prediction."""

from mixflow_fast.objective.mixflow import Interpolation, MixFlow, mixflow_loss

__all__ = ["Interpolation", "MixFlow", "mixflow_loss"]
