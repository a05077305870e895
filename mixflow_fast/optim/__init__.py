"""AdamW with averages of the weights, and its learning rate."""
