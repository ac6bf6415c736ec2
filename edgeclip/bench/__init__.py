"""Measuring engines operator by operator, and devices as a whole."""
