"""Attention on a packed qkv."""
