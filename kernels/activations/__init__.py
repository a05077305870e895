"""Activations together with the bias before them."""
