"""Checks of an installation and of a run: doctor, kernel checks, verify-resume."""
