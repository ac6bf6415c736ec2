"""Teachers that are arrays on disk: embeddings computed elsewhere, a row a sample.

The files stay on disk and are mapped; a batch reads its rows, by the numbers of its samples
(:attr:`~edgeclip.distill.batches.Batch.index`), which are right on every rank and for samples that stand in
for broken ones. An embedding is of the whole picture and of one caption: views that crop much, and captions
drawn from several, do not go with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgeclip.distill.batches import Batch
from edgeclip.distill.inputs import Consumer, Inputs, StoredViews
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.objective import Embedded
from edgeclip.distill.recipe import DataSpec, EmbeddingsTeacher, StageSpec
from edgeclip.distill.samples import Samples
from edgeclip.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EmbeddingFiles", "map_rows", "open_embedding_files"]

_DTYPES = ("float16", "float32", "float64")


class EmbeddingFiles:
    """A teacher whose embeddings lie in ``.npy`` files.

    Args:
        spec: what the recipe says of it.
        image: ``(N, d)`` embeddings of the pictures; ``None``: it has none.
        text: likewise, of a caption of each picture.
        parent: what the student's checkpoint records about it.
    """

    def __init__(
        self,
        spec: EmbeddingsTeacher,
        *,
        image: NDArray[Any] | None,
        text: NDArray[Any] | None,
        parent: Mapping[str, Any],
    ) -> None:
        self.name = spec.name
        self._spec, self._image, self._text = spec, image, text
        self.image_dim: int | None = None if image is None else image.shape[1]
        self.text_dim: int | None = None if text is None else text.shape[1]
        self.scale = spec.scale
        self.views: StoredViews | None = None
        self.parent = dict(parent)

    @property
    def consumer(self) -> Consumer | None:
        """Nothing is prepared for it."""
        return None

    def check(self, stage: StageSpec, table: DataSpec, samples: Samples) -> None:
        """Raise unless the rows are those of a stage's samples.

        Raises:
            ConfigError: another number of rows, another digest, or captions that rows cannot be of.
        """
        who = f"teacher {self.name!r}"
        for key, rows in (("image", self._image), ("text", self._text)):
            if rows is not None and len(rows) != len(samples):
                raise ConfigError(
                    f"{who}: {key!r} has {len(rows)} rows, expected {len(samples)}, one for each sample of "
                    f"[data.{stage.data}] in its order."
                )
        if self._spec.digest is not None and self._spec.digest != samples.digest:
            raise ConfigError(
                f"{who}: 'digest' is {self._spec.digest[:16]!r}, but the samples of [data.{stage.data}] have "
                f"{samples.digest[:16]!r}; the embeddings belong to other data or another order."
            )
        if self._text is not None and (stage.texts > 1 or len(table.captions) > 1):
            raise ConfigError(
                f"{who}: 'text' has one row a sample, but stage {stage.name!r} draws {stage.texts} captions "
                f"of the kinds {sorted(table.captions)}; expected one caption of one kind."
            )

    def ask(self, batch: Batch, inputs: Inputs, *, parts: int = 1) -> Embedded:
        """Return the rows of a batch, see :class:`edgeclip.distill.teachers.Teacher`.

        Raises:
            InputError: a row is not finite.
        """
        text = self._rows("text", self._text, batch)
        return Embedded(self._rows("image", self._image, batch), () if text is None else (text,))

    def _rows(self, key: str, rows: NDArray[Any] | None, batch: Batch) -> Tensor | None:
        if rows is None:
            return None
        said = torch.from_numpy(np.asarray(rows[batch.index.cpu().numpy()], dtype=np.float32))  # (b, d)
        broken = (~said.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise InputError(
                f"teacher {self.name!r}: row {int(batch.index[broken[0]])} of {key!r} (sample "
                f"{batch.keys[broken[0]]!r}) is not finite; compute the embeddings again."
            )
        return said.to(batch.index.device)

    def to(self, device: torch.device) -> EmbeddingFiles:
        """Return itself: rows go where the batch is."""
        return self


def open_embedding_files(spec: EmbeddingsTeacher, root: Path) -> EmbeddingFiles:
    """Return a teacher over ``.npy`` files, mapped and not read.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: a file is missing, or holds anything but an ``(N, d)`` array of floats.
    """
    arrays = {
        key: None if said is None else map_rows(root / said, f"teacher {spec.name!r}: {key!r}")
        for key, said in (("image", spec.image), ("text", spec.text))
    }
    file = spec.image or spec.text or ""
    parent = parent_of(spec.name, "teacher", spec.licence, file, "embeddings", ())
    return EmbeddingFiles(spec, image=arrays["image"], text=arrays["text"], parent=parent)


def map_rows(path: Path, where: str) -> NDArray[Any]:
    """Return the rows ``(N, d)`` of an ``.npy`` file, mapped and not read.

    Raises:
        ConfigError: it is missing, or holds anything but an ``(N, d)`` array of floats; begins with
            ``where``.
    """
    try:
        rows: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever its parser of headers stumbles over
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where} is {str(path)!r}, which cannot be read as a .npy file: {reason}."
        ) from error
    if rows.ndim != 2 or rows.dtype.name not in _DTYPES or 0 in rows.shape:
        raise ConfigError(
            f"{where} is {str(path)!r} with {rows.dtype} {rows.shape}, expected (N, d) of "
            f"{' or '.join(_DTYPES)}."
        )
    return rows
