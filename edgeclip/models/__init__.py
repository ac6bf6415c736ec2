"""Towers in PyTorch."""
