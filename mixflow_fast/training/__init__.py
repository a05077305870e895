"""The training loop on DeepSpeed and what belongs to it."""
