"""Weights in files: read without executing anything, recognised, loaded, written."""
