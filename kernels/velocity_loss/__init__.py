"""The loss of the flow and its gradient."""
