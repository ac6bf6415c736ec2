"""Learned prompts: the words before a label as free vectors, found on unlabelled pictures.

CoOp (Zhou et al. 2022, "Learning to prompt for vision-language models", §3.2, unified context): the words of
a template before the label ("a photo of a") become vectors of the text tower's table, the same for every
label, and are trained through the frozen tower. Targets are not labels but the soft labels that
:mod:`edgeclip.distill.adapt` makes. What comes out is a row a label, so that it runs wherever a bank does.

The context starts as the words it stands for. A fifth of the pictures is kept out, and the context is the one
at which their targets were most likely: that ends training where it stops to help, without a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.distill.adapt import Self, Taught, soft_labels
from edgeclip.distill.eager import tokenizer_of
from edgeclip.distill.inputs import check_tokenizer
from edgeclip.errors import ConfigError, InputError
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.models.checkpoints import load_model, read_checkpoint_info
from edgeclip.models.clip import build_text_tower
from edgeclip.models.state_files import read_state
from edgeclip.models.text import BagTextTower
from edgeclip.models.text_transformer import TextTransformer
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEAST_PARITY", "LearnedPrompts", "PromptSettings", "PromptTower", "open_prompt_tower"]

LEAST_PARITY = 0.98
"""Least mean cosine of a checkpoint's labels with those of the bundle; int8 text towers have 0.99."""
_PREFIX = "text_tower."
_KEPT_OUT = 5


@dataclass(frozen=True)
class PromptSettings:
    """How a context is trained.

    Attributes:
        steps: of the optimizer, over all pictures each.
        learning_rate: of Adam, in lengths of a mean row of the context.
        patience: steps without a better context after which training ends.
    """

    steps: int = 60
    learning_rate: float = 0.1
    patience: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.patience < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"learned prompts: steps {self.steps}, patience {self.patience} and learning_rate "
                f"{self.learning_rate}, expected more than 0."
            )


class PromptTower:
    """A frozen text tower whose first words can be replaced by vectors.

    Args:
        tower: a transformer or a bag of pieces.
        tokenizer: its own.
        labels: what is encoded.
        templates: one template, with words before the label.
        where: what messages call the checkpoint.

    Raises:
        ConfigError: another kind of tower, several templates, or no words before the label.
    """

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Tokenizer,
        labels: LabelSet,
        templates: Templates,
        *,
        where: str = "checkpoint",
    ) -> None:
        if isinstance(tower, TextTransformer):
            self._table: nn.Module = tower.token_embedding
        elif isinstance(tower, BagTextTower):
            self._table = tower.pieces
        else:
            raise ConfigError(
                f"{where}: its text tower is a {type(tower).__name__}; prompts are learned through "
                "transformers and bags of pieces. Use `--method vectors`."
            )
        if len(templates.texts) != 1:
            raise ConfigError(
                f"learned prompts: got {len(templates.texts)} templates, expected one whose words before the "
                "label are learned, such as --templates 'a photo of a {}.'."
            )
        (template,) = templates.texts
        self._tower = tower.eval().requires_grad_(requires_grad=False)
        phrases = [label.texts(templates.texts) for label in labels.labels]
        spoken = [text for label in phrases for each in label for text in each]
        written = [len(label.synonyms) + 1 for label in labels.labels]
        self._count = [len(label) for label in phrases]
        self._templated = torch.tensor(
            [number < most for each, most in zip(self._count, written, strict=True) for number in range(each)]
        )
        tokens = tokenizer(spoken, truncate=True)
        before = tokenizer([template.split("{}")[0], ""], truncate=True)
        self._first, self._end = _context(tokens[self._templated.numpy()], before)
        if self._end == self._first:
            raise ConfigError(
                f"learned prompts: the template {template!r} has no words before the label that can be "
                "learned; expected some, such as --templates 'a photo of a {}.'."
            )
        self._tokens = torch.from_numpy(tokens)

    @property
    def words(self) -> int:
        """Tokens that are learned."""
        return self._end - self._first

    @torch.no_grad()
    def start(self) -> Tensor:
        """Return the vectors ``(words, D)`` that the words of the template have."""
        row = self._tokens[self._templated][:1, self._first : self._end]
        rows: Tensor = self._table(row)[0]
        return rows.clone()

    def rows(self, context: Tensor) -> Tensor:
        """Return the unit rows ``(N, E)`` of the labels.

        Args:
            context: ``(words, D)``.
        """

        def instead(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            put = context.to(output.dtype).expand(len(output), -1, -1)
            return torch.cat([output[:, : self._first], put, output[:, self._end :]], dim=1)

        hook = self._table.register_forward_hook(instead)
        try:
            texts = F.normalize(self._tower(self._tokens[self._templated]), dim=-1)
        finally:
            hook.remove()
        if not bool(self._templated.all()):
            described = F.normalize(self._tower(self._tokens[~self._templated]), dim=-1)
            every = texts.new_empty(len(self._tokens), texts.shape[1])
            every = every.masked_scatter(self._templated[:, None], texts)
            texts = every.masked_scatter(~self._templated[:, None], described)
        pooled = torch.stack([part.mean(dim=0) for part in torch.split(texts, self._count)])
        return F.normalize(pooled, dim=-1)

    def check(self, rows: NDArray[np.float32], *, where: str) -> float:
        """Return how similar the labels are to those of the bundle, as a mean cosine.

        Raises:
            ConfigError: they are of another model.
        """
        with torch.no_grad():
            own = self.rows(self.start()).numpy()
        if own.shape != rows.shape:
            raise ConfigError(
                f"{where}: embeds texts into {own.shape[1]} dimensions, the bundle into {rows.shape[1]}; "
                "expected the checkpoint that the bundle was exported from."
            )
        cosine = float((own * rows).sum(axis=1).mean())
        if not cosine >= LEAST_PARITY:
            raise ConfigError(
                f"{where}: its labels have a mean cosine of {cosine:.3f} with those of the bundle, expected "
                f"at least {LEAST_PARITY}: it is not the checkpoint that the bundle was exported from."
            )
        return cosine


def _context(tokens: NDArray[np.int32], before: NDArray[np.int32]) -> tuple[int, int]:
    """Return where the words before the label begin and end in every row.

    Args:
        tokens: ``(T, L)`` rows of prompts.
        before: ``(2, L)`` the words before the label alone, and nothing.
    """
    first = _alike(before[0] == before[1])
    return first, max(first, _alike((tokens == before[0]).all(axis=0)))


def _alike(same: NDArray[np.bool_]) -> int:
    """Return how many values at the beginning are true."""
    return len(same) if same.all() else int(np.argmin(same))


@dataclass(frozen=True, eq=False)
class LearnedPrompts:
    """Rows from learned prompts; a :class:`edgeclip.distill.adapt.Fit`.

    Attributes:
        tower: what rows come from.
        targets: who says the soft labels.
        scale: multiplier of cosines.
        settings: of the training.
        seed: of the pictures kept out.
    """

    tower: PromptTower
    targets: Self | Taught
    scale: float
    settings: PromptSettings = PromptSettings()
    seed: int = 0

    def __call__(
        self, pictures: NDArray[np.float32], rows: NDArray[np.float32], chosen: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Return the rows, see :class:`edgeclip.distill.adapt.Fit`.

        Raises:
            InputError: training gave numbers that are not finite.
        """
        said = self._said(pictures, rows, chosen)
        order = np.random.default_rng(self.seed).permutation(len(chosen))
        kept, used = np.split(order, [max(1, len(order) // _KEPT_OUT)])
        seen = torch.from_numpy(pictures[chosen])
        wanted = torch.from_numpy(said.astype(np.float32))
        context = self.tower.start().requires_grad_()
        step = self.settings.learning_rate * float(context.detach().norm(dim=1).mean())
        optimizer = torch.optim.Adam([context], lr=step / context.shape[1] ** 0.5)
        best, found, since = np.inf, context.detach().clone(), 0
        for _ in range(self.settings.steps):
            logits = self.scale * (seen @ self.tower.rows(context).T)
            loss = F.cross_entropy(logits[used], wanted[used])
            held_out = float(F.cross_entropy(logits[kept].detach(), wanted[kept]))
            if held_out < best:
                best, found, since = held_out, context.detach().clone(), 0
            else:
                since += 1
                if since >= self.settings.patience:
                    break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            learned: NDArray[np.float32] = self.tower.rows(found).numpy()
        if not np.isfinite(learned).all():
            raise InputError("learned prompts: training diverged; take a smaller learning rate.")
        return learned

    def _said(
        self, pictures: NDArray[np.float32], rows: NDArray[np.float32], chosen: NDArray[np.intp]
    ) -> NDArray[np.floating[Any]]:
        """Return the targets of the chosen pictures ``(m, N)``."""
        if isinstance(self.targets, Taught):
            return self.targets.said[chosen]
        adapted = self.targets(pictures, rows, chosen)
        return soft_labels(self.scale * (pictures[chosen] @ adapted.T), 0.0, None)


def open_prompt_tower(
    path: str,
    labels: LabelSet,
    templates: Templates,
    *,
    model: str | None = None,
    threads: int | None = None,
) -> PromptTower:
    """Return the text tower of a checkpoint, ready for prompts.

    Args:
        path: a checkpoint's directory, or a published file of a model of the zoo.
        labels: what will be encoded.
        templates: see :class:`PromptTower`.
        model: name of the model, where it is a file.
        threads: of torch, for the whole process; as they are if missing.

    Raises:
        InputError: the checkpoint cannot be read.
        ConfigError: it cannot be used, see :class:`PromptTower`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = f"checkpoint {path!r}"
    if not (Path(path) / "config.json").is_file():
        loaded = load_model(path, model=model)
        return PromptTower(
            loaded.model.text_tower, tokenizer_of(path, loaded), labels, templates, where=where
        )
    config = read_checkpoint_info(path).config
    tokenizer = Tokenizer.open(path)
    check_tokenizer(config, tokenizer, who=where)
    # The text tower alone: weights of an image tower may lie elsewhere.
    state = read_state(Path(path) / "model.safetensors")
    own = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    tower = build_text_tower(config.text)
    try:
        tower.load_state_dict({key: value.float() for key, value in own.items()})
    except RuntimeError as error:
        raise InputError(
            f"{where}: its text tower does not fit its config: {' '.join(str(error).split())[:200]}"
        ) from error
    return PromptTower(tower, tokenizer, labels, templates, where=where)
