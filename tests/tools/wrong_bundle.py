"""Bundles that are whole and still wrong: every hash fits, the numbers do not."""

from __future__ import annotations

from pathlib import Path

from tiny_bundle import make_tiny_bundle

from edgeclip.bundle import Bundle, BundleWriter


def put_wrong_model(bundle: Path, scratch: Path, variant: str = "onnx-int8") -> Bundle:
    """Make the image tower of one variant that of another model, with a manifest that agrees."""
    other = make_tiny_bundle(scratch / "other", seed=1)
    with BundleWriter(bundle) as writer:
        entry = writer.manifest["variants"][variant]["towers"]["image"]
        stored = writer.add(f"{variant}/image.onnx", other.variant(variant).tower("image").model)
        entry.update(model=stored, files=[stored])
        return writer.commit()
