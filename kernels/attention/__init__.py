"""Self-attention on a packed qkv, with norm and rotation of q and k."""
