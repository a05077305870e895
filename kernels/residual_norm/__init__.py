"""Residual, norm and modulation of adaLN blocks in one pass."""
