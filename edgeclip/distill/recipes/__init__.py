"""Recipes that come with edgeclip, by name: ``edgeclip train plain-clip``."""
