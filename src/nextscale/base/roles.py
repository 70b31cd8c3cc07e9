"""The roles that a reward can have, as written in recipes and run folders."""

ROLES = ("weight", "at_least", "at_most", "held_out")
"""Maximised with a weight, kept above or below a bound, or only measured. Each reward has one role."""
