"""Shared ground: errors, records, seeding, metrics, tensor files; imports nothing else of the package."""
