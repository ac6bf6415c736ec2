"""Calibration sets, ranges and sensitivity; installs as ``edgeclip.calibration``."""
