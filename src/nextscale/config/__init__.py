"""Recipes in, objects out."""
