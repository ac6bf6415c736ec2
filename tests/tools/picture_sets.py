"""Sets of pictures in the forms of others."""

from __future__ import annotations

from pathlib import Path

from tar_shards import make_shard, picture


def clip_benchmark(root: Path, *, retrieval: bool = False, shards: int = 2, split: str = "test") -> Path:
    """Write a set as clip_benchmark's converter does: numbered shards with .cls or .txt."""
    (root / split).mkdir(parents=True)
    for number in range(shards):
        members = {}
        for row in range(3):
            key = f"s{3 * number + row:07d}"
            members[f"{key}.{('webp', 'png', 'jpg')[row]}"] = picture(
                3 * number + row, kind=("WEBP", "PNG", "JPEG")[row]
            )
            if retrieval:
                members[f"{key}.txt"] = f"picture {3 * number + row}\nthe same picture\n".encode()
            else:
                members[f"{key}.cls"] = str(row).encode()
        make_shard(root / split / f"{number}.tar", members)
    (root / split / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    if retrieval:
        (root / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
    else:
        (root / "classnames.txt").write_text("crane\ncrane\nred fox\n", encoding="utf-8")
        (root / "zeroshot_classification_templates.txt").write_text(
            "a photo of a {c}.\nart of the {c}.\n", encoding="utf-8"
        )
    return root
