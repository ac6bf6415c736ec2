"""A bench report as one page: tables and plots, without scripts and without anything from elsewhere.

It can be opened without a network, mailed and printed, and follows the reader's light or dark. What is
missing in the report is said where it would stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from edgeclip.bench.report import (
    COLD_PHASES,
    END_TO_END,
    FIRST_LABEL,
    MAX_STEAL_SHARE,
    BenchReport,
    BenchRun,
)
from edgeclip.bench.svg import Bar, Dot, Part, Strip, element, scatter_plot, stack_plot, strip_plot
from edgeclip.runtime.host import UNAVAILABLE
from edgeclip.runtime.latency import STAGES
from edgeclip.runtime.latency_report import StageEntry

__all__ = ["to_html"]

_PERCENTILES: Final = (50.0, 90.0, 99.0)
_PICTURE_STAGES: Final = {
    "decode": "decode",
    "resize": "resize",
    "image_tower": "image tower",
    "head": "labels and head",
}
_COLD: Final = {
    "interpreter": "Python starts",
    "import": "import",
    "open": "open",
    "compile": "compile",
    "labels": "label vectors",
    "decode": "decode",
    "first_run": "first run",
}
_EMPTY: Final = "&#8203;"  # a cell without children would be left open
_ACCURACY: Final = ("top1", "accuracy", "recall_at_1", "map", "top5")
"""Last words of metrics that are drawn, the first that a manifest has."""


def to_html(report: BenchReport) -> str:
    """Return a report as one HTML document."""
    runs = report.runs
    body = [
        element("h1", escape(report.subject)),
        _lead(report),
        *_warnings(report),
        _section("Summary", _summary(runs), _SUMMARY_NOTE),
        _section("How long a picture takes", _figure(_distribution(runs)), _distribution_note(runs)),
        _section("Where the time goes", *_stages(runs)),
        _section("From nothing to the first label", *_cold(runs)),
        _section("Accuracy, latency and size", *_pareto(runs)),
        _section(
            "Every target",
            *[_details(number, run, opened=len(runs) == 1) for number, run in enumerate(runs, 1)],
        ),
        _section("The machine", *_machine(report)),
        _section("How to repeat it", *_repeat(report)),
    ]
    head = [
        '<meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        '<meta name="color-scheme" content="light dark"/>',
        element("title", escape(f"{report.subject}: edgeclip bench")),
        f"<style>{_STYLE}</style>",
    ]
    return (
        "<!doctype html>\n"
        f'<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n<main>\n'
        f"{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


# --- words -------------------------------------------------------------------------------------------------


def _paragraph(said: str, class_: str = "") -> str:
    return element("p", escape(said), class_=class_) if class_ else element("p", escape(said))


def _section(title: str, *parts: str) -> str:
    return element("section", element("h2", escape(title)), *filter(None, parts))


def _figure(drawing: str) -> str:
    return element("figure", drawing)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1, class_: str = "") -> str:
    """Return a table whose first ``words`` columns are words, the others numbers.

    Cells are text; what stands in brackets behind a number is set below it.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            element(tag, escape(cell) or _EMPTY, class_="word")
            if place < words
            else element(tag, _number(cell), class_="number")
            for place, cell in enumerate(row)
        )

    head = element("thead", element("tr", cells("th", heading)))
    body = element("tbody", *[element("tr", cells("td", row)) for row in rows])
    return element("div", element("table", head, body, class_=class_ or "plain"), class_="wide")


def _number(said: str) -> str:
    """Return the markup of a number; its interval, in brackets behind it, is set below it."""
    value, between, rest = said.partition(" (")
    if not between:
        return escape(said) or _EMPTY
    return f"{escape(value)} {element('small', escape(f'({rest}'))}"


def _megabytes(size_bytes: int | str) -> str:
    return size_bytes if isinstance(size_bytes, str) else f"{size_bytes / 1e6:.1f} MB"


def _percentile(entry: StageEntry, p: float, *, interval: bool = True) -> str:
    for found in entry.percentiles:
        if found.p == p:
            between = f" ({found.low_ms:.2f} to {found.high_ms:.2f})" if interval else ""
            return f"{found.ms:.2f}{between}"
    return "-"


def _ordered(stages: Mapping[str, StageEntry]) -> list[str]:
    order = {name: place for place, name in enumerate((*STAGES, END_TO_END))}
    return sorted(stages, key=lambda name: order.get(name, len(order)))


def _numbered(number: int, name: str) -> str:
    return f"{number}  {name}"


# --- the top -----------------------------------------------------------------------------------------------


def _lead(report: BenchReport) -> str:
    sizes = report.pictures.megapixels
    span = f"{min(sizes):.1f} to {max(sizes):.1f}" if len(sizes) > 1 else f"{sizes[0]:.1f}"
    host = report.host
    said = [
        f"{report.pictures.n} {report.pictures.source}, {span} megapixels",
        f"{report.labels.n:,} labels",
        f"{host.get('cpu_model', UNAVAILABLE)}, {host.get('cores', '?')} usable cores",
        report.created,
    ]
    return element("p", escape(" · ".join(said)), class_="about")


def _warnings(report: BenchReport) -> list[str]:
    said = [
        f"{run.name}: {warning}. Do not trust these figures, measure again."
        for run in report.runs
        for warning in run.warnings()
    ]
    if isinstance(report.steal_share, float) and report.steal_share > MAX_STEAL_SHARE:
        said.append(f"The hypervisor gave {report.steal_share:.1%} of the run to others: measure again.")
    return [element("ul", *[element("li", escape(each)) for each in said], class_="warning")] if said else []


_SUMMARY_NOTE: Final = element(
    "p",
    "Percentiles are of whole calls from file to labels, in ms, with 95 % intervals; a dash stands where "
    "there are too few calls. First label: from the start of a fresh process, with filled caches. RSS: the "
    "most that a fresh process held. Of peak: operations of the image tower a second over those of the best "
    "matrix product in the same run.",
    class_="note",
)


def _summary(runs: Sequence[BenchRun]) -> str:
    """Return a table with two rows a target: its name, however long it is, and its numbers."""
    heading = (
        "p50 of a call", "p90", "p99", "batch", "n", "images/s", "first label, ms", "RSS", "files", "of peak",
    )  # fmt: skip
    rows = []
    for number, run in enumerate(runs, 1):
        whole = run.stages[END_TO_END]
        cold = run.cold_start.get("hit", {}).get(FIRST_LABEL)
        share = None if run.arithmetic is None else run.arithmetic.share
        p50 = _percentile(whole, 50.0)
        cells = (
            f"{whole.wall_ms:.2f}" if p50 == "-" else p50,
            _percentile(whole, 90.0),
            _percentile(whole, 99.0),
            str(run.batch),
            f"{whole.n:,}",
            _rate(run),
            "-" if cold is None else f"{cold.wall_ms:.0f}",
            "-" if run.memory is None else _megabytes(run.memory.peak_rss_bytes),
            _megabytes(run.size_bytes),
            "-" if share is None else f"{share:.0%}",
        )
        name = escape(_numbered(number, run.name))
        if run.warnings():
            name += " " + element("span", "disturbed", class_="flag")
        rows.append(element("tr", element("td", name, colspan=len(cells)), class_="who"))
        rows.append(element("tr", *[element("td", _number(cell), class_="number") for cell in cells]))
    head = element("tr", *[element("th", escape(cell), class_="number") for cell in heading])
    table = element("table", element("thead", head), element("tbody", *rows), class_="summary")
    return element("div", table, class_="wide")


def _rate(run: BenchRun) -> str:
    rate = run.images_per_s
    between = "" if rate.low is None or rate.high is None else f" ({rate.low:.1f} to {rate.high:.1f})"
    return f"{rate.value:.1f}{between}"


# --- plots -------------------------------------------------------------------------------------------------


def _distribution(runs: Sequence[BenchRun]) -> str:
    rows = []
    for number, run in enumerate(runs, 1):
        whole = run.stages[END_TO_END]
        marks = {f"p{found.p:g}": found for found in whole.percentiles if found.p in _PERCENTILES}
        first = next(iter(marks.values()), None)
        rows.append(
            Strip(
                _numbered(number, run.name),
                f"p50 {whole.ms:.2f} ms, n {whole.n:,}",
                [sample / run.batch for sample in whole.samples_ms],
                {name: found.ms / run.batch for name, found in marks.items()},
                None if first is None else (first.low_ms / run.batch, first.high_ms / run.batch),
            )
        )
    return strip_plot(rows, title="Time of every call by target", label="ms a picture")


def _distribution_note(runs: Sequence[BenchRun]) -> str:
    said = "A dot is a call, from file to labels; the box is the 95 % interval of its median."
    if any(run.batch > 1 for run in runs):
        said += " Calls of several pictures are divided by their number."
    if any(run.stages[END_TO_END].n > 500 for run in runs):
        said += " Of more than 500 calls 500 are drawn, evenly from the fastest to the slowest."
    return _paragraph(f"{said} A percentile is drawn where ten calls or more took longer.", "note")


def _stages(runs: Sequence[BenchRun]) -> list[str]:
    bars = []
    for number, run in enumerate(runs, 1):
        whole = run.stages[END_TO_END]
        parts = [Part(name, run.stages[name].ms) for name in _PICTURE_STAGES if name in run.stages]
        bars.append(Bar(_numbered(number, run.name), f"end to end {whole.ms:.2f} ms", parts, whole.ms))
    if not any(bar.parts for bar in bars):
        return [_paragraph("No stages were timed.", "missing")]
    drawing = stack_plot(
        bars,
        _PICTURE_STAGES,
        title="Stages by target",
        label="ms a picture",
        mark_label="end to end",
    )
    note = "Medians of the stages of a picture, one after the other, and the median of the whole call."
    if any(run.batch > 1 for run in runs):
        note += " In batches decoders run side by side: the stages may sum to more than the whole."
    return [_figure(drawing), _paragraph(note, "note")]


def _cold(runs: Sequence[BenchRun]) -> list[str]:
    bars = []
    for number, run in enumerate(runs, 1):
        for kind, found in run.cold_start.items():
            parts = [Part(f"cold-{name}", found[name].wall_ms) for name in _COLD if name in found]
            whole = found.get(FIRST_LABEL)
            note = "" if whole is None else f"{whole.wall_ms:,.0f} ms, n {whole.n}"
            name = f"{_numbered(number, run.name)}, cache {kind}"
            bars.append(Bar(name, note, parts, None if whole is None else whole.wall_ms))
    if not bars:
        why = next((run.missing["cold_start"] for run in runs if "cold_start" in run.missing), "")
        said = "No cold starts were measured" + (f": {why}." if why else "; --cold N measures them.")
        return [_paragraph(said, "missing")]
    drawing = stack_plot(
        bars,
        {f"cold-{name}": said for name, said in _COLD.items()},
        title="Cold start by phase and target",
        label="ms",
        mark_label="first label",
    )
    note = (
        "Medians over fresh processes. With a cache hit compiled models and label vectors are there already; "
        "with a miss the cache directory is empty. The line is the median of the whole, from the start of "
        "the process to the first label; what lies between phases belongs to it alone."
    )
    return [_figure(drawing), _paragraph(note, "note")]


def _pareto(runs: Sequence[BenchRun]) -> list[str]:
    known = {number: _numbers(run.accuracy or {}) for number, run in enumerate(runs, 1)}
    metric = _metric(known.values())
    if metric is None:
        said = (
            "No plot: no manifest of these targets carries an accuracy. `edgeclip eval` measures it; makers "
            "of bundles write it into the manifest, under 'accuracy' of a variant."
        )
        return [_paragraph(said, "missing")]
    points = {
        number: (runs[number - 1].stages[END_TO_END].ms, found[metric], runs[number - 1].size_bytes)
        for number, found in known.items()
        if metric in found
    }
    dots = []
    for number, (x, y, size) in points.items():
        beaten = any(
            other != (x, y, size) and other[0] <= x and other[1] >= y and other[2] <= size
            for other in points.values()
        )
        low, high = known[number].get(f"{metric}_interval.0"), known[number].get(f"{metric}_interval.1")
        dots.append(
            Dot(runs[number - 1].name, str(number), x, y, float(size), best=not beaten, low=low, high=high)
        )
    drawing = scatter_plot(
        dots,
        title="Accuracy against time, circles by size of files",
        x_label="ms a picture, end to end",
        y_label=f"↑ {metric}",
    )
    sets = {str((runs[number - 1].accuracy or {}).get("dataset", "")) for number in points} - {""}
    rows = [
        (str(number), runs[number - 1].name, f"{y:.4f}", f"{x:.2f}", _megabytes(size))
        for number, (x, y, size) in points.items()
    ]
    said = f"{metric} as the manifest says it"
    said += f" ({'; '.join(sorted(sets))})" if sets else ""
    said += (
        ", not measured in this run. Circles are as large as the files; filled ones are beaten by no other "
    )
    said += "in accuracy, time and size at once."
    if any(dot.low is not None for dot in dots):
        said += " Lines are the intervals of the accuracy that the manifest gives."
    parts = [
        _figure(drawing),
        _paragraph(said, "note"),
        _table(("", "target", metric, "ms a picture", "files"), rows, words=2),
    ]
    left = [runs[number - 1].name for number in known if number not in points]
    if left:
        parts.append(
            _paragraph(f"Not drawn, because their manifests carry no {metric}: {', '.join(left)}.", "missing")
        )
    return parts


def _numbers(said: Any, path: str = "") -> dict[str, float]:
    """Return the numbers of a nested document by their paths."""
    if isinstance(said, bool):
        return {}
    if isinstance(said, (int, float)):
        return {path: float(said)}
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(said, Mapping):
        pairs = said.items()
    elif isinstance(said, (list, tuple)):
        pairs = enumerate(said)
    found: dict[str, float] = {}
    for key, value in pairs:
        found |= _numbers(value, f"{path}.{key}" if path else str(key))
    return found


def _metric(known: Iterable[Mapping[str, float]]) -> str | None:
    """Return the metric that most targets have, by its path; where several do, the better known one."""
    counts: dict[str, int] = {}
    for found in known:
        for path, value in found.items():
            if path.rpartition(".")[2] in _ACCURACY and 0 <= value <= 1:
                counts[path] = counts.get(path, 0) + 1
    return min(
        counts,
        key=lambda path: (-counts[path], _ACCURACY.index(path.rpartition(".")[2])),
        default=None,
    )


# --- details -----------------------------------------------------------------------------------------------


def _details(number: int, run: BenchRun, *, opened: bool) -> str:
    where = run.placement
    decoding = "reduced-scale decoding" if run.fast_decode else "exact decoding"
    parts = [
        element("summary", escape(_numbered(number, run.name))),
        _paragraph(
            f"{where.get('backend')} on {where.get('device')}, {run.threads} thread(s), batch {run.batch}, "
            f"{where.get('precision')}, {decoding}"
        ),
    ]
    if where.get("why"):
        parts.append(_paragraph(str(where["why"]), "note"))
    rows = []
    for name in _ordered(run.stages):
        entry = run.stages[name]
        drift = "-" if entry.drift is None else f"{entry.drift.ratio - 1:+.1%}"
        percentiles = (_percentile(entry, p) for p in _PERCENTILES)
        rows.append((name, f"{entry.ms:.2f}", *percentiles, str(entry.batch), f"{entry.n:,}", drift))
    parts.append(_table(("stage, ms", "each", "p50", "p90", "p99", "batch", "n", "drift"), rows))
    if run.cold_start:
        phases = [phase for phase in COLD_PHASES if any(phase in each for each in run.cold_start.values())]
        cold = []
        for kind, found in run.cold_start.items():
            cells = [f"{found[phase].wall_ms:.0f}" if phase in found else "-" for phase in phases]
            cold.append((f"cache {kind}", *cells, str(max(each.n for each in found.values()))))
        parts.append(_table(("cold start, ms", *(phase.replace("_", " ") for phase in phases), "n"), cold))
    parts.append(element("ul", *[element("li", escape(said)) for said in _facts(run)]))
    return element("details", *parts, **({"open": "open"} if opened else {}))


def _facts(run: BenchRun) -> list[str]:
    said = [f"images/s: {_rate(run)}"]
    if run.memory is not None:
        rss, pss = _megabytes(run.memory.peak_rss_bytes), _megabytes(run.memory.peak_pss_bytes)
        said.append(f"memory of a fresh process: RSS {rss}, PSS {pss} at most")
    said += [
        f"{entry.batch} labels, {way}: {entry.wall_ms:.2f} ms ({entry.ms:.3f} each, n = {entry.n})"
        for way, entry in run.text.items()
    ]
    found = run.arithmetic
    if found is not None:
        share = found.int8_operations / found.operations if found.operations else 0.0
        lead = (
            f"image tower: {found.operations / 1e6:,.1f} million operations a picture ({share:.0%} int8), "
            f"{found.achieved_per_s / 1e9:.1f} GOP/s"
        )
        if found.peak_per_s is None or found.share is None:
            said.append(f"{lead}; {found.why}")
        else:
            peak = f"{found.peak_per_s / 1e9:.1f} that matrix products reach in this run"
            said.append(f"{lead} of {peak}: {found.share:.0%}")
    steal, drift = run.interference.steal_share, run.interference.drift
    drifted = (
        "unknown"
        if drift is None
        else f"{drift.ratio - 1:+.1%} ({drift.low - 1:+.1%} to {drift.high - 1:+.1%})"
    )
    said.append(f"interference: steal {steal if isinstance(steal, str) else f'{steal:.1%}'}, drift {drifted}")
    said.append(f"files: {_megabytes(run.size_bytes)}")
    said += [f"no {name}: {why}" for name, why in run.missing.items()]
    return said


def _machine(report: BenchReport) -> list[str]:
    parts = []
    if report.peaks is not None:
        for unit, found in (("GFLOP/s", report.peaks.float_gflops), ("int8 GOP/s", report.peaks.int8_gops)):
            if found:
                products = ", ".join(f"{rate:.1f} at {n}" for n, rate in found.items())
                parts.append(_paragraph(f"Best matrix product of one thread: {products} {unit}."))
    host = [(name.replace("_", " "), _value(value)) for name, value in report.host.items()]
    parts.append(_table(("host", ""), host, words=2, class_="facts"))
    parts.append(_table(("package", "version"), report.versions.items(), words=2, class_="facts"))
    return parts


def _repeat(report: BenchReport) -> list[str]:
    facts = [
        ("bundle", report.bundle.get("digest", "")),
        ("pictures", report.pictures.digest),
        ("labels", f"{report.labels.n:,}, {report.labels.source}, templates {report.labels.templates}"),
        ("seed", str(report.seed)),
        ("measured for", f"{report.duration_s:.1f} s"),
        ("created", report.created),
    ]
    note = (
        "Targets take turns in random order. The raw samples are in the JSON document (-o FILE, or --json)."
    )
    return [
        element("pre", element("code", escape(report.command))),
        _table(("", ""), [fact for fact in facts if fact[1]], words=2, class_="facts"),
        _paragraph(note, "note"),
    ]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


# Colours of stages hold 3:1 against both backgrounds, and each has an ink of its own on it.
_STYLE: Final = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1a2129; --soft: #57616c;
  --grid: #dde2e8; --accent: #1f6fb8; --warn: #8a4b00; --warn-page: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1a2027; --ink: #e6eaef;
  --soft: #9aa6b2; --grid: #2b333c; --accent: #58a6e8; --warn: #ffc266; --warn-page: #33260f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; }
p { margin: 8px 0; overflow-wrap: anywhere; }
.about { color: var(--soft); margin-bottom: 18px; }
.note { color: var(--soft); font-size: .88rem; max-width: 74ch; }
.missing { background: var(--card); border-radius: 8px; padding: 12px 16px; }
.warning { background: var(--warn-page); color: var(--warn); border-radius: 8px; padding: 12px 16px 12px 34px;
  margin: 12px 0; overflow-wrap: anywhere; }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 16px 12px 8px;
  overflow-x: auto; }
svg { display: block; width: 100%; min-width: 680px; height: auto; }
.wide { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.word { text-align: left; }
.number { text-align: right; white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .78rem; }
.summary { min-width: 100%; }
.who td { border-bottom: 0; padding-top: 12px; padding-bottom: 0; font-weight: 600; overflow-wrap: anywhere; }
.flag { background: var(--warn-page); color: var(--warn); border-radius: 4px; padding: 1px 7px;
  font-size: .78rem; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
.facts { display: inline-table; max-width: 100%; }
details { border: 1px solid var(--grid); border-radius: 8px; padding: 10px 16px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: 8px; padding: 12px 16px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
ul { padding-left: 20px; }
.ink { fill: var(--ink); } .soft { fill: var(--soft); } .name { font-weight: 600; }
.small { font-size: 11px; }
.grid { stroke: var(--grid); } .mark { stroke: var(--ink); stroke-width: 2; }
.dot { fill: var(--accent); fill-opacity: .4; }
.between { fill: var(--ink); fill-opacity: .3; }
.lead { fill: none; stroke: var(--soft); stroke-opacity: .55; stroke-dasharray: 2 3; }
.whisker { stroke: var(--accent); stroke-width: 1.5; stroke-opacity: .5; }
.point { fill: var(--accent); fill-opacity: .08; stroke: var(--accent); stroke-width: 1.5; }
.point.best { fill-opacity: .45; }
.tag { fill: var(--page); stroke: var(--accent); } .tag.best { fill: var(--accent); }
.on-tag { fill: var(--page); }
.fill-decode, .fill-cold-decode { fill: #3573b5; } .on-decode, .on-cold-decode { fill: #ffffff; }
.fill-resize, .fill-cold-open { fill: #5fb4e5; } .on-resize, .on-cold-open { fill: #10202b; }
.fill-image_tower, .fill-cold-first_run { fill: #e0701a; }
.on-image_tower, .on-cold-first_run { fill: #14100a; }
.fill-head, .fill-cold-labels { fill: #2f9a57; } .on-head, .on-cold-labels { fill: #08130c; }
.fill-cold-interpreter { fill: #8b96a3; } .on-cold-interpreter { fill: #10151a; }
.fill-cold-import { fill: #66717e; } .on-cold-import { fill: #ffffff; }
.fill-cold-compile { fill: #8e63c7; } .on-cold-compile { fill: #ffffff; }
@media print { main { max-width: none; padding: 0; } figure, details { break-inside: avoid; } }
"""
