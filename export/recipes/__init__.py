"""Recipes that build bundles."""
