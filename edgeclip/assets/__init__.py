"""Data files of the package: the embedded bundle and the CLIP vocabulary."""
