"""From a checkpoint to a verified bundle; installs as ``edgeclip.export``."""
