"""Do two forms of a tower agree? The numbers, the limits, and the check of a bundle against its golden file.

The golden file holds pictures and tokens with the embeddings that the eager float32 model gave, so that any
device can check itself without the model. Nothing here opens files other than the bundle's, or knows why two
forms might differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from edgeclip.errors import BundleError, InputError
from edgeclip.runtime.rows import has_free_length, run_rows, run_texts
from edgeclip.runtime.session import DEFAULT_OPTIONS, RuntimeOptions, Session, open_session
from edgeclip.tensors import map_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle, Parity, Variant

__all__ = [
    "DEGENERATE_SIMILARITY",
    "Basis",
    "Golden",
    "GoldenReport",
    "ParityFailure",
    "ParityLimits",
    "ParityNumbers",
    "TowerParity",
    "check_parity",
    "check_tower",
    "compare_embeddings",
    "compare_logits",
    "golden_check",
    "judge_tower",
    "run_both_lengths",
]

Basis = Literal["trained", "centred"]

DEGENERATE_SIMILARITY: Final = 0.9
MIN_RANKED: Final = 8  # fewer pictures than this say nothing about ranks
_CUT_TOGETHER: Final = 4


@dataclass(frozen=True)
class ParityNumbers:
    """How far a candidate is from its reference.

    Attributes:
        n: compared embeddings.
        max_abs: largest difference of one element.
        cosine_min: of a row with its reference.
        cosine_mean: of a row with its reference.
        centred_cosine_mean: the same after taking the reference's mean row off both; ``None`` for one row.
            With random weights all rows are nearly equal and only this number says anything.
        top1_agreement: share of rows with the same best label; ``None`` without a bank.
        top5_agreement: mean share of common labels in the two top fives; ``None`` without a bank.
        reference_similarity: median cosine between two rows of the reference; ``None`` for one row.
        worst: row with the smallest cosine.
        not_finite: rows with NaN or infinity, which count as cosine -1.
    """

    n: int
    max_abs: float
    cosine_min: float
    cosine_mean: float
    centred_cosine_mean: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    reference_similarity: float | None
    worst: int
    not_finite: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for a report."""
        return asdict(self)


@dataclass(frozen=True)
class ParityLimits:
    """What is still agreement; ``None`` does not look at that number.

    ``top1_agreement`` is coarse where rows are few: one row may always differ, and below eight rows ranks are
    not judged. So it bites from a hundred rows on, and catches gross damage before.
    """

    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    centred_cosine_mean: float | None = None
    top1_agreement: float | None = None

    @classmethod
    def of(cls, precision: str, basis: Basis = "trained") -> ParityLimits:
        """Return the default limits of a precision; an unknown one gets those of int8.

        Args:
            precision: of the tower.
            basis: ``"centred"`` where the reference embeddings are all alike.
        """
        limits = _LIMITS if basis == "trained" else _CENTRED_LIMITS
        return limits.get(precision, limits["int8"])

    @classmethod
    def of_classifier(cls, precision: str, basis: Basis = "trained") -> ParityLimits:
        """Return the default limits of a graph with labels inside; ``max_abs`` is on its cosines."""
        if basis == "centred":
            return cls(max_abs=cls.of(precision, basis).max_abs)
        return cls(max_abs=cls.of(precision).max_abs, top1_agreement=_LIMITS["int8"].top1_agreement)

    def accepting(self, said: Parity | None) -> ParityLimits:
        """Return limits that what a manifest says was accepted beyond them is within.

        The golden inputs are some of those that were measured, so that means may be a little lower here: half
        way to the smallest one, and three times the labels that disagree.
        """
        if said is None or not said.missed:
            return self
        wider: dict[str, float | None] = {}
        if "max_abs" in said.missed and said.max_abs is not None:
            wider["max_abs"] = 2 * said.max_abs
        if "cosine_min" in said.missed and said.cosine_min is not None:
            wider["cosine_min"] = said.cosine_min - 0.02
        if "cosine_mean" in said.missed and said.cosine_mean is not None:
            least = said.cosine_mean if said.cosine_min is None else said.cosine_min
            wider["cosine_mean"] = (said.cosine_mean + least) / 2 - 0.01
        if "centred_cosine_mean" in said.missed and said.centred_cosine_mean is not None:
            wider["centred_cosine_mean"] = said.centred_cosine_mean - 0.1
        if "top1_agreement" in said.missed and said.top1_agreement is not None:
            wider["top1_agreement"] = max(0.0, 1 - 3 * (1 - said.top1_agreement))
        return replace(self, **wider)


_LIMITS: Final = {
    "fp32": ParityLimits(max_abs=1e-4, cosine_min=0.99999),
    "fp16": ParityLimits(cosine_min=0.999),
    "int8": ParityLimits(cosine_mean=0.99, top1_agreement=0.98),
}
_CENTRED_LIMITS: Final = {
    "fp32": ParityLimits(max_abs=1e-4, centred_cosine_mean=0.999),
    # What is left of alike embeddings without their mean is below the rounding of float16.
    "fp16": ParityLimits(max_abs=5e-3),
    "int8": ParityLimits(max_abs=0.2),
}


@dataclass(frozen=True)
class ParityFailure:
    """One number beyond its limit; as text, one clause of a sentence."""

    number: str
    got: float
    limit: float
    worst: int

    def __str__(self) -> str:
        if self.number == "not_finite":
            return f"{self.got:.0f} embeddings are not finite (first bad row {self.worst})"
        relation = "at most" if self.number in ("max_abs", "reference_similarity") else "at least"
        text = f"{self.number} is {self.got:.6g}, expected {relation} {self.limit:g}"
        if self.number == "reference_similarity":
            return f"{text}: the reference embeddings are all alike, so cosines prove nothing"
        return f"{text} (worst row {self.worst})"


def compare_embeddings(
    reference: NDArray[Any], candidate: NDArray[Any], *, bank: NDArray[Any] | None = None
) -> ParityNumbers:
    """Return how far candidate embeddings are from reference embeddings.

    Args:
        reference: ``(n, E)``.
        candidate: ``(n, E)``, row for row the same inputs.
        bank: ``(N, E)`` label embeddings for the agreement of ranks.

    Raises:
        InputError: the shapes do not fit, or there is no row.
    """
    if reference.ndim != 2 or reference.shape != candidate.shape or not len(reference):
        raise InputError(
            f"embeddings: got shapes {reference.shape} and {candidate.shape}, expected (n, E) twice."
        )
    if bank is not None and (bank.ndim != 2 or bank.shape[1] != reference.shape[1]):
        raise InputError(f"bank: got shape {bank.shape}, expected (N, {reference.shape[1]}).")
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    bad = ~np.isfinite(b).all(axis=1)
    b[bad] = 0.0
    cosine = np.where(bad, -1.0, _cosine(a, b))
    mean = a.mean(axis=0)
    top1 = top5 = None
    if bank is not None:
        labels = _unit(bank.astype(np.float64))
        ours, theirs = _top(a, labels), _top(b, labels)
        top1 = float(((ours[:, 0] == theirs[:, 0]) & ~bad).mean())
        shared = [len(set(x) & set(y)) / len(x) for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)]
        top5 = float((np.array(shared) * ~bad).mean())
    return ParityNumbers(
        n=len(a),
        max_abs=float(np.abs(a - b).max()),
        cosine_min=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        centred_cosine_mean=float(_cosine(a - mean, b - mean).mean()) if len(a) > 1 else None,
        top1_agreement=top1,
        top5_agreement=top5,
        reference_similarity=_similarity(a),
        worst=int(cosine.argmin()),
        not_finite=int(bad.sum()),
    )


def compare_logits(
    reference: NDArray[Any], candidate: NDArray[Any], *, similarity: float | None = None
) -> ParityNumbers:
    """Return how far the cosines of a graph with labels inside are from the reference's.

    Args:
        reference: ``(n, N)`` cosines with N labels.
        candidate: ``(n, N)``, logits over the scale.
        similarity: median cosine between two reference embeddings, for the report.

    Raises:
        InputError: the shapes do not fit, or there is no row.
    """
    numbers = compare_embeddings(reference, candidate)
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    bad = np.asarray(~np.isfinite(b).all(axis=1))
    b[bad] = 0.0
    ours, theirs = _five(a), _five(b)
    shared = [len(set(x) & set(y)) / len(x) for x, y in zip(ours.tolist(), theirs.tolist(), strict=True)]
    return replace(
        numbers,
        top1_agreement=float(((ours[:, 0] == theirs[:, 0]) & ~bad).mean()),
        top5_agreement=float((np.array(shared) * ~bad).mean()),
        reference_similarity=similarity,
        worst=int(np.where(bad, np.inf, np.abs(a - b).max(axis=1)).argmax()),
    )


def check_parity(
    numbers: ParityNumbers, limits: ParityLimits, *, similarity_limit: float | None = None
) -> tuple[ParityFailure, ...]:
    """Return the numbers that are beyond their limits.

    Args:
        numbers: what was measured.
        limits: what is still agreement.
        similarity_limit: largest median cosine between two reference rows for which cosines mean anything,
            :data:`DEGENERATE_SIMILARITY` for pictures.
    """
    if numbers.not_finite:
        return (ParityFailure("not_finite", numbers.not_finite, 0, numbers.worst),)
    failures = []
    similarity = numbers.reference_similarity
    if similarity_limit is not None and similarity is not None and similarity >= similarity_limit:
        failures.append(ParityFailure("reference_similarity", similarity, similarity_limit, numbers.worst))
    if limits.max_abs is not None and not numbers.max_abs <= limits.max_abs:
        failures.append(ParityFailure("max_abs", numbers.max_abs, limits.max_abs, numbers.worst))
    for name in ("cosine_min", "cosine_mean", "centred_cosine_mean"):
        limit, got = getattr(limits, name), getattr(numbers, name)
        if limit is not None and got is not None and not got >= limit:
            failures.append(ParityFailure(name, got, limit, numbers.worst))
    limit, got = limits.top1_agreement, numbers.top1_agreement
    if limit is not None and got is not None and numbers.n >= MIN_RANKED:
        allowed = max(1, math.floor(numbers.n * (1 - limit) + 1e-9))
        if round((1 - got) * numbers.n) > allowed:
            failures.append(ParityFailure("top1_agreement", got, limit, numbers.worst))
    return tuple(failures)


# --- a bundle against its golden file ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Golden:
    """The golden file of a bundle: inputs, and what eager float32 made of them.

    Attributes:
        images: ``(n, H, W, 3)`` uint8 at tower size.
        tokens: ``(m, L)`` int32; ``None`` where the bundle carries no text tower's check.
        image_embedding: ``(n, E)`` float32.
        text_embedding: ``(m, E)`` float32, with ``tokens``.
        bank: ``(N, E)`` embeddings of the label bank it names; ``None`` where it is not in the bundle.
        bank_name: name of that bank.
    """

    images: NDArray[np.uint8]
    tokens: NDArray[np.int32] | None
    image_embedding: NDArray[np.float32]
    text_embedding: NDArray[np.float32] | None
    bank: NDArray[np.float32] | None
    bank_name: str | None

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Read the golden file of a bundle.

        Raises:
            BundleError: the bundle has none, or it is malformed.
        """
        name = bundle.manifest.golden
        if name is None:
            raise BundleError(
                f"{bundle.where}: it has no golden file, so its numbers cannot be checked here. "
                "Export it again with golden pictures."
            )
        where = f"golden file {name!r}"
        tensors, metadata = map_tensors(bundle.file(name), where=where)
        embed_dim = bundle.manifest.model.embed_dim
        height, width = bundle.manifest.preprocess.image_size_px
        images = _tensor(tensors, "images", np.uint8, (None, height, width, 3), where)
        image_embedding = _tensor(tensors, "image_embedding", np.float32, (len(images), embed_dim), where)
        tokens = text_embedding = None
        if "tokens" in tensors:
            tokens = _tensor(tensors, "tokens", np.int32, (None, None), where)
            text_embedding = _tensor(tensors, "text_embedding", np.float32, (len(tokens), embed_dim), where)
        bank_name = metadata.get("bank")
        bank = _bank(bundle, bank_name)
        if bank is not None and bank.shape[1] != embed_dim:
            raise BundleError(
                f"{bundle.where}: bank {bank_name!r} has shape {bank.shape}, expected (N, {embed_dim})."
            )
        return cls(images, tokens, image_embedding, text_embedding, bank, bank_name)


@dataclass(frozen=True)
class TowerParity:
    """What the check of one tower gave.

    Attributes:
        tower: ``"image"`` or ``"text"``.
        numbers: what was measured.
        limits: what was expected.
        failures: numbers beyond their limits; none means that the tower passed.
        bank: label bank behind the ranks.
    """

    tower: str
    numbers: ParityNumbers
    limits: ParityLimits
    failures: tuple[ParityFailure, ...]
    bank: str | None

    @property
    def passed(self) -> bool:
        """Whether every number is within its limit."""
        return not self.failures


@dataclass(frozen=True)
class GoldenReport:
    """What the golden check of one variant gave, tower by tower."""

    variant: str
    towers: Mapping[str, TowerParity]

    @property
    def passed(self) -> bool:
        """Whether every tower passed."""
        return all(tower.passed for tower in self.towers.values())


def golden_check(
    bundle: Bundle,
    variant: Variant | str,
    *,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    limit: int | None = None,
    limits: ParityLimits | None = None,
) -> GoldenReport:
    """Run the golden inputs through every tower of a variant and compare with eager float32.

    Args:
        bundle: an open bundle with a golden file.
        variant: which one.
        options: where to run.
        limit: how many inputs to take of each kind; all without.
        limits: instead of the defaults of the variant's precision.

    Raises:
        BundleError: no golden file, no such variant, or damaged files.
        BackendError: a tower cannot be run here.
    """
    chosen = bundle.variant(variant) if isinstance(variant, str) else variant
    golden = Golden.of(bundle)
    towers = {}
    for tower in sorted(chosen.entry.towers):
        if tower == "text" and golden.tokens is None:
            continue
        if tower == "classifier" and _baked(bundle, chosen) is None:
            continue
        with open_session(chosen.tower(tower), options=options) as session:
            towers[tower] = check_tower(bundle, golden, chosen, tower, session, limit=limit, limits=limits)
    return GoldenReport(chosen.name, towers)


def check_tower(
    bundle: Bundle,
    golden: Golden,
    variant: Variant,
    tower: str,
    session: Session,
    *,
    limit: int | None = None,
    limits: ParityLimits | None = None,
) -> TowerParity:
    """Run golden inputs through an open session and compare; see :func:`golden_check`.

    Raises:
        BundleError: the tower is neither an image nor a text tower, or its output is not an embedding.
    """
    if tower in ("image", "classifier"):
        rows: NDArray[Any] = golden.images[:limit]
        if bundle.manifest.preprocess.applied == "host":
            from edgeclip.preprocess import Preprocess

            rows = Preprocess(bundle.manifest.preprocess).normalize(rows)
        reference = golden.image_embedding[:limit]
    elif tower == "text" and golden.tokens is not None and golden.text_embedding is not None:
        rows, reference = golden.tokens[:limit], golden.text_embedding[:limit]
    else:
        raise BundleError(f"{bundle.where}: its golden file has nothing for a {tower!r} tower.")
    if tower == "text":
        candidate = run_both_lengths(bundle, session, rows, reference)
    else:
        candidate = run_rows(session, rows)
    if tower == "classifier":
        return _check_classifier(bundle, variant, reference, candidate, limits)
    return judge_tower(bundle, golden, variant, tower, candidate, limits=limits)


def run_both_lengths(
    bundle: Bundle, session: Session, tokens: NDArray[np.int32], reference: NDArray[np.float32]
) -> NDArray[Any]:
    """Run rows of a text tower with all their padding, and where it takes that as well, without.

    Args:
        bundle: whose tokenizer made the rows.
        session: the tower.
        tokens: ``(n, L)``.
        reference: ``(n, E)``.

    Returns:
        ``(n, E)``: of each row the form that is farther from its reference.
    """
    full = run_rows(session, tokens)
    files = bundle.manifest.tokenizer
    if files is None or not has_free_length(session) or full.shape != reference.shape:
        return full
    from edgeclip.tokenizer import read_config

    lengths = read_config(bundle.read(files.config)).lengths(tokens)
    # Few at a time, so that not all rows are as long as the longest.
    parts = [slice(start, start + _CUT_TOGETHER) for start in range(0, len(tokens), _CUT_TOGETHER)]
    cut = np.concatenate([run_texts(session, tokens[part], lengths[part]) for part in parts])
    off_full, off_cut = (
        np.nan_to_num(np.abs(each - reference), nan=np.inf).max(axis=1, keepdims=True) for each in (full, cut)
    )
    return np.where(off_cut > off_full, cut, full)


def judge_tower(
    bundle: Bundle,
    golden: Golden,
    variant: Variant,
    tower: str,
    candidate: NDArray[Any],
    *,
    limits: ParityLimits | None = None,
) -> TowerParity:
    """Compare embeddings that a tower gave of the first golden inputs with those of eager float32.

    Args:
        bundle: whose golden file it is.
        golden: inputs and reference.
        variant: whose tower.
        tower: ``"image"`` or ``"text"``.
        candidate: ``(n, E)``, of as many golden inputs as there are rows.
        limits: instead of the defaults of the variant's precision.

    Raises:
        BundleError: these are no such embeddings.
    """
    is_image = tower == "image"
    known = golden.image_embedding if is_image else golden.text_embedding
    reference = known[: len(candidate)] if known is not None else None
    if reference is None or candidate.shape != reference.shape:
        expected = "none" if reference is None else f"embeddings {reference.shape}"
        raise BundleError(
            f"{bundle.where}: the {tower} tower of {variant.name!r} gives {candidate.shape}, expected "
            f"{expected}."
        )
    said = variant.entry.parity.get(tower)
    basis: Basis = "trained" if said is None else said.basis
    numbers = compare_embeddings(reference, candidate, bank=golden.bank if is_image else None)
    limits = limits or ParityLimits.of(variant.entry.precision, basis).accepting(said)
    if not is_image:
        limits = replace(limits, top1_agreement=None)
    judged = is_image and numbers.n > 2 and basis == "trained"
    failures = check_parity(numbers, limits, similarity_limit=DEGENERATE_SIMILARITY if judged else None)
    return TowerParity(tower, numbers, limits, failures, golden.bank_name if is_image else None)


def _check_classifier(
    bundle: Bundle,
    variant: Variant,
    reference: NDArray[Any],
    logits: NDArray[Any],
    limits: ParityLimits | None,
) -> TowerParity:
    """Compare the logits of a graph with labels inside with the cosines of reference embeddings."""
    said = variant.entry.parity.get("classifier")
    labels = _baked(bundle, variant)
    if said is None or labels is None or logits.shape != (len(reference), len(labels)):
        raise BundleError(
            f"{bundle.where}: the classifier of {variant.name!r} gives {logits.shape}, and its labels are "
            f"{'not in the bundle' if labels is None else len(labels)}."
        )
    numbers = compare_logits(
        reference @ labels.T, logits / bundle.manifest.model.scale, similarity=_similarity(reference)
    )
    limits = limits or ParityLimits.of_classifier(variant.entry.precision, said.basis).accepting(said)
    return TowerParity("classifier", numbers, limits, check_parity(numbers, limits), said.bank)


def _baked(bundle: Bundle, variant: Variant) -> NDArray[np.float32] | None:
    """Return the embeddings of the labels inside a variant's classifier, as its parity names their bank."""
    said = variant.entry.parity.get("classifier")
    labels = None if said is None else _bank(bundle, said.bank)
    # Stored in float16, rows are a little off the unit length that they are baked with.
    return None if labels is None else _unit(labels.astype(np.float64)).astype(np.float32)


def _tensor(
    tensors: Mapping[str, NDArray[Any]],
    name: str,
    dtype: type[np.generic],
    shape: tuple[int | None, ...],
    where: str,
) -> NDArray[Any]:
    array = tensors.get(name)
    if array is None:
        raise BundleError(f"{where}: it has no tensor {name!r}, only {sorted(tensors)}. Export it again.")
    fits = array.ndim == len(shape) and all(
        want in (None, size) for size, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits or not len(array):
        expected = ", ".join("n" if size is None else str(size) for size in shape)
        raise BundleError(
            f"{where}: tensor {name!r} is {array.dtype} {array.shape}, expected "
            f"{np.dtype(dtype)} ({expected})."
        )
    return array


def _bank(bundle: Bundle, name: str | None) -> NDArray[np.float32] | None:
    entry = None if name is None else bundle.manifest.label_banks.get(name)
    if entry is None:
        return None
    tensors, _ = map_tensors(bundle.file(entry.file), where=f"label bank {name!r}")
    embeddings = tensors.get("embeddings")
    return None if embeddings is None or embeddings.ndim != 2 else embeddings.astype(np.float32)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.maximum(norms, 1e-30)
    return unit


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    cosine: NDArray[np.float64] = (_unit(a) * _unit(b)).sum(axis=1)
    return cosine


def _top(rows: NDArray[np.float64], bank: NDArray[np.float64]) -> NDArray[np.intp]:
    return _five(rows @ bank.T)


def _five(similarity: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(-similarity, axis=1, kind="stable")[:, :5]


def _similarity(rows: NDArray[np.float64]) -> float | None:
    if len(rows) < 2:
        return None
    sample = _unit(rows[:512])  # a median needs no more, and all pairs of them are plenty
    pairs = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    return float(np.median(pairs))
