"""Optimizers with averages of the weights, learning rates, and steps that skip bad gradients."""
