"""Frozen networks that numbers are measured in."""
