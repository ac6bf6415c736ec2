"""A comparison as text for people: tables that fit 100 columns, the most asked for first."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import east_asian_width

from edgeclip.evaluate.metrics import Share
from edgeclip.evaluate.results import Comparison, Counts, Interval, Robustness
from edgeclip.evaluate.retrieval import KS

__all__ = ["comparison_table", "per_class_table"]

WIDTH = 100
_NAME = 30  # longest name of a model
_LABEL = 40
_MISSING = "-"


def comparison_table(comparison: Comparison) -> str:
    """Return what was measured and how every model did."""
    lines = [_heading(comparison), "numbers in %, with 95 % intervals in brackets", ""]
    if comparison.task == "zero-shot":
        lines += _zero_shot(comparison)
        if comparison.seed is not None:
            lines += _robustness(comparison)
    else:
        lines += _retrieval(comparison)
    for counts in (comparison.data, comparison.ood):
        lines += [] if counts is None else _left_out(counts)
    return "\n".join(lines)


def per_class_table(comparison: Comparison) -> str:
    """Return top-1 of every label, the hardest for the first model first."""
    column = comparison.columns[0]
    reports = [(row.name, row.reports[column].per_class) for row in comparison.rows]
    first = reports[0][1]
    names = sorted(first, key=lambda name: (first[name].value, name))
    rows = [
        [_cut(name, _LABEL), f"{first[name].n:,}", *(_percent(each[name].value) for _, each in reports)]
        for name in names
    ]
    title = f"top-1 of every label{f' ({column})' if column else ''}, %"
    return "\n".join([title, *grid(["label", "n", *(name for name, _ in reports)], rows)])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, groups: Sequence[int] = ()) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right.

    Where they are wider than 100 columns, the columns go on in a further block below, with the first one
    again.

    Args:
        header: of the columns.
        rows: as many cells each.
        groups: numbers of columns that should begin a block, where one is needed.
    """
    header = [_cut(cell, _NAME) for cell in header]
    widths = [max(map(_width, column)) for column in zip(header, *rows, strict=True)]
    blocks, block, width = [], list[int](), widths[0]
    ends = [*groups, len(header)]
    for column in range(1, len(header)):
        end = next(each for each in ends if each > column)
        whole = sum(widths[each] + 2 for each in range(column, end))
        if block and (width + widths[column] + 2 > WIDTH or (column in groups and width + whole > WIDTH)):
            blocks.append(block)
            block, width = [], widths[0]
        block.append(column)
        width += widths[column] + 2
    lines: list[str] = []
    for each_block in [*blocks, block]:
        if lines:
            lines.append("")
        for row in [header, *rows]:
            cells = (_padded(row[column], widths[column], left=True) for column in each_block)
            lines.append("  ".join([_padded(row[0], widths[0]), *cells]).rstrip())
    return lines


def _heading(comparison: Comparison) -> str:
    data = comparison.data
    said = f"{_cut(data.path, 60)}: {data.measured:,} pictures"
    if data.taken < data.total - len(data.left_out):
        said += f" of {data.total:,}"
    if comparison.task == "retrieval":
        return said
    prompts = [
        f"{f'{language} ' if language else ''}{_cut(repr(texts[0]), 30) if len(texts) == 1 else len(texts)}"
        for language, texts in comparison.templates.items()
    ]
    instead = comparison.instead
    asked = f"prompts: {', '.join(prompts)}"
    if instead is not None and instead.name:
        asked = f"{instead.kind}: {_cut(instead.name, 60)}"
    contexts = len(comparison.answers.context)
    if contexts:
        asked += f", in {contexts} context{'s' if contexts > 1 else ''}"
    return f"{said}, {comparison.labels:,} labels\n{asked}"


def _zero_shot(comparison: Comparison) -> list[str]:
    several = len(comparison.rows) > 1
    header, groups = ["model"], []
    for language in comparison.columns:
        groups.append(len(header))
        header += [f"{language} top-1".strip(), "top-5", "recall", "ECE"]
        header += ["agree"] if several else []
        header += ["corr.", "kept"] if comparison.seed is not None else []
    rows = []
    for row in comparison.rows:
        cells = [_cut(row.name, _NAME)]
        for language in comparison.columns:
            report = row.reports[language]
            cells += [
                _interval(report.top1),
                _percent(report.top5.value),
                _percent(report.mean_per_class_recall),
                _percent(report.calibration_error),
            ]
            if several:
                agreement = row.agreement.get(language)
                cells.append(_MISSING if agreement is None else _percent(agreement.value))
            if comparison.seed is not None:
                robustness = row.robustness[language]
                cells += [_percent(robustness.mean), _percent(robustness.retained)]
        rows.append(cells)
    lines = grid(header, rows, groups=groups)
    lines += ["", "recall: mean over the labels; ECE: expected calibration error of the first label's score"]
    if several:
        lines.append("agree: pictures whose first label is that of the first row")
    if comparison.seed is not None:
        lines.append("corr.: top-1 on corrupted pictures, mean; kept: as a share of top-1")
    if comparison.answers.gated:
        lines += ["", *_rejections(comparison)]
    if comparison.answers.multi:
        lines += ["", *_several(comparison)]
    if comparison.ood is not None:
        lines += ["", *_out_of_distribution(comparison)]
    return lines


def _rejections(comparison: Comparison) -> list[str]:
    rows = []
    for row in comparison.rows:
        for language, found in row.rejections.items():
            apart = found.held_out
            cells = [_named(row.name, language), f"{found.threshold:.2f}", _interval(found.right)]
            cells += [_percent(found.wrong.value), _percent(found.rejected.value)]
            accepted = None if apart is None else apart.accepted
            cells += [_MISSING if accepted is None else _interval(accepted)]
            cells += [_MISSING if apart is None else f"{apart.auroc['gate']:.3f}"]
            rows.append(cells)
    return [
        "first label right, wrong, or no label given; held out: the same, their own label not offered",
        *grid(["model", "threshold", "right", "wrong", "none", "held out: given one", "AUROC"], rows),
    ]


def _several(comparison: Comparison) -> list[str]:
    rows = []
    for row in comparison.rows:
        for language, found in row.several.items():
            cells = [_named(row.name, language), *(_interval(each) for each in (found.f1, found.first_alone))]
            cells += [_percent(found.precision), _percent(found.recall)]
            rows.append([*cells, f"{found.given:.2f}", f"{found.right:.2f}"])
    return [
        "labels judged one by one: F1 of those given, and of the first of each picture alone",
        *grid(["model", "F1", "first alone", "precision", "recall", "given", "right"], rows),
    ]


def _named(name: str, language: str) -> str:
    return _cut(name, _NAME) + (f" {language}" if language else "")


def _out_of_distribution(comparison: Comparison) -> list[str]:
    gated = comparison.answers.gated
    kinds = {"score": "p", "similarity": "s", "gate": "g"}
    said = [kind for kind in kinds if kind in next(iter(comparison.rows[0].ood.values())).auroc]
    rows = []
    for row in comparison.rows:
        for language, found in row.ood.items():
            cells = [_named(row.name, language)]
            for kind in said:
                cells += [f"{found.auroc[kind]:.3f}", _percent(found.fpr95[kind])]
            cells += [_percent(found.accepted.value)] if gated and found.accepted is not None else []
            rows.append(cells)
    counts = comparison.ood
    path = "" if counts is None else f"{counts.measured:,} pictures of {_cut(counts.path, 30)}"
    names = {"score": "probability (p)", "similarity": "similarity (s)", "gate": "gate (g)"}
    title = f"told from {path} by {', '.join(names[kind] for kind in said)}"
    header = [f"{what} {kinds[kind]}" for kind in said for what in ("AUROC", "FPR95")]
    return [title, *grid(["model", *header, *(["given one"] if gated else [])], rows)]


def _robustness(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for row in comparison.rows:
        for language, found in row.robustness.items():
            name = _cut(row.name, _LABEL) + (f", {language}" if language else "")
            lines += ["", f"{name}: top-1 on corrupted pictures, % (clean {_percent(found.clean.value)})"]
            lines += grid(*_severities(found))
    return lines


def _severities(found: Robustness) -> tuple[list[str], list[list[str]]]:
    severities = list(next(iter(found.corrupted.values())))
    rows = []
    for name, shares in found.corrupted.items():
        mean = found.mean_of(name)
        retained = mean / found.clean.value if found.clean.value else None
        rows.append([name, *(_percent(shares[each].value) for each in severities)])
        rows[-1] += [_percent(mean), _percent(retained)]
    blank = [""] * len(severities)
    rows.append(["all", *blank, _percent(found.mean), _percent(found.retained)])
    return ["corruption", *map(str, severities), "mean", "kept"], rows


def _retrieval(comparison: Comparison) -> list[str]:
    header, groups = ["model"], []
    for kind in comparison.columns:
        for way in ("i>t", "t>i"):
            groups.append(len(header))
            header += [f"{kind} {way} R@1" if k == 1 else f"R@{k}" for k in KS]
    rows = []
    for row in comparison.rows:
        cells = [_cut(row.name, _NAME)]
        for kind in comparison.columns:
            report = row.retrieval[kind]
            for shares in (report.image_to_text, report.text_to_image):
                cells += [_interval(shares[k]) if k == 1 else _percent(shares[k].value) for k in KS]
        rows.append(cells)
    lines = grid(header, rows, groups=groups)
    lines += ["", "i>t: a picture finds one of its texts; t>i: a text finds one of its pictures"]
    for kind, report in comparison.rows[0].retrieval.items():
        without = comparison.without.get(kind, 0)
        left = f"; {without:,} pictures have none" if without else ""
        lines.append(f"{kind}: {report.pictures:,} pictures, {report.texts:,} distinct texts{left}")
    return lines


def _left_out(counts: Counts) -> list[str]:
    if not counts.left_out:
        return []
    shown = [f"  {_cut(each.key, _LABEL)!r}: {_cut(each.reason, 50)}" for each in counts.left_out[:3]]
    more = len(counts.left_out) - len(shown)
    return [
        "",
        f"{len(counts.left_out):,} pictures of {counts.path} are left out:",
        *shown,
        *([f"  … and {more:,} more"] if more else []),
    ]


def _interval(each: Share | Interval) -> str:
    return f"{_percent(each.value)} ({_percent(each.low)}-{_percent(each.high)})"


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}"


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _padded(text: str, width: int, *, left: bool = False) -> str:
    blank = " " * (width - _width(text))
    return blank + text if left else text + blank


def _cut(text: str, length: int) -> str:
    """Return a text of at most so many characters: the end of a name tells more than its beginning."""
    return text if len(text) <= length else "…" + text[1 - length :]
