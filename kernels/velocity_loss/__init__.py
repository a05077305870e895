"""The loss of a prediction and its gradient, in one pass."""
