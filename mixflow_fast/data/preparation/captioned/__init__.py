"""Listings of the three layouts in which people keep images with captions."""
