"""A transformer block in fused operators."""
