"""Names of the roles that a reward may have, as recipes and run folders write them."""

ROLES = ("weight", "at_least", "at_most", "held_out")
"""Trained on with a weight, kept within a bound (either way), or only measured; a reward has one of them."""
