"""The page of a bench report: well-formed, complete, safe, and legible with many targets and with few."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeclip.bench.html import to_html
from edgeclip.bench.report import (
    COLD_PHASES,
    END_TO_END,
    ArithmeticEntry,
    BenchReport,
    BenchRun,
    InterferenceEntry,
    LabelsEntry,
    MemoryEntry,
    PeaksEntry,
    PicturesEntry,
    RateEntry,
    stage_entry,
)
from edgeclip.bench.svg import (
    WIDTH,
    Bar,
    Dot,
    Part,
    Strip,
    element,
    scatter_plot,
    shorten,
    stack_plot,
    strip_plot,
    text_width,
)
from edgeclip.runtime.latency import LatencySamples
from edgeclip.runtime.latency_report import DriftEntry, StageEntry

SVG = "{http://www.w3.org/2000/svg}"
LONG = (
    "/home/somebody/bundles/mobileclip2-s0-trained-on-everything#onnx-int8@x86-avx2-with-a-long-suffix,"
    "backend=openvino,device=hetero:gpu,cpu,threads={},batch=8,decode=fast"
)
VOID = {"meta", "br", "link", "img", "input", "hr"}


def _stage(median_ms: float, *, n: int = 1200, batch: int = 1, seed: int = 0) -> StageEntry:
    rng = np.random.default_rng(seed)
    samples = np.round(median_ms * rng.lognormal(0, 0.2, n), 4)
    return stage_entry(
        LatencySamples(samples, batch=batch), drift=DriftEntry(ratio=1.013, low=0.98, high=1.04)
    )


def _run(number: int, **changes: Any) -> BenchRun:
    factor = 1 + number * 0.37
    stages = {
        name: _stage(ms * factor, seed=number)
        for name, ms in [("decode", 21.7), ("resize", 3.3), ("image_tower", 48.9), ("head", 0.41)]
    }
    stages["tokenize"] = _stage(0.13, n=25)
    stages["text_tower"] = _stage(31.7, n=25, batch=16)
    stages[END_TO_END] = _stage(75.1 * factor, seed=number)
    cold = {phase: _stage(103.0 + 17 * place, n=5) for place, phase in enumerate(COLD_PHASES)}
    said: dict[str, Any] = {
        "name": f"onnx-int8,threads={number}",
        "variant": "onnx-int8",
        "placement": {"backend": "ort", "device": "cpu", "precision": "int8"},
        "threads": number,
        "batch": 1,
        "stages": stages,
        "images_per_s": RateEntry(value=13.3 / factor, low=12.9 / factor, high=13.8 / factor),
        "cold_start": {"hit": cold, "miss": cold},
        "memory": MemoryEntry(peak_rss_bytes=98_765_432 + number, peak_pss_bytes=65_432_109),
        "text": {"uncached": _stage(35.83, n=21, batch=16), "cached": _stage(0.83, n=21, batch=16)},
        "arithmetic": ArithmeticEntry(
            operations=771_000_000,
            int8_operations=650_000_000,
            achieved_per_s=16.3e9,
            peak_per_s=117.2e9,
            share=0.139,
        ),
        "interference": InterferenceEntry(
            steal_share=0.002, drift=DriftEntry(ratio=1.013, low=0.98, high=1.04)
        ),
        "size_bytes": 11_300_000 * number,
        "accuracy": {"dataset": "stamps", "en": {"n": 141, "top1": 0.5 + 0.03 * number, "top5": 0.8}},
    }
    return BenchRun(**(said | changes))


def _report(runs: int | tuple[BenchRun, ...] = 3, **changes: Any) -> BenchReport:
    said: dict[str, Any] = {
        "subject": "edgeclip-default",
        "created": "2026-01-31T12:00:00Z",
        "command": "edgeclip bench default --threads 1,2",
        "bundle": {"name": "edgeclip-default", "digest": "ab" * 32},
        "pictures": PicturesEntry(
            source="demonstration photographs", n=2, megapixels=(0.3, 12.2), size_bytes=5, digest="cd" * 32
        ),
        "labels": LabelsEntry(n=998, source="bundle", templates="one"),
        "runs": tuple(_run(number + 1) for number in range(runs)) if isinstance(runs, int) else runs,
        "peaks": PeaksEntry(float_gflops={"512": 54.3, "1024": 61.7}, int8_gops={"512": 201.9}),
        "host": {"cpu_model": "Some CPU", "cores": 2, "isa": ["avx2", "fma"]},
        "versions": {"edgeclip": "0.1.0", "numpy": "2.4.1"},
    }
    return BenchReport(**(said | changes))


class _Page(HTMLParser):
    """Collect text, tags and attributes, and refuse elements that are not closed in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        # of HTML's own elements only void ones close themselves; a <td/> stays open
        assert tag in VOID or "svg" in self.open, tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _parsed(drawing: str) -> ET.Element:
    return ET.fromstring(drawing)  # noqa: S314 - made here


def _drawings(page: str) -> list[ET.Element]:
    return [_parsed(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


ALL = {
    "one": 1,
    "three": 3,
    "eight": tuple(_run(number, name=LONG.format(number)) for number in range(1, 9)),
    "bare": (
        _run(
            1,
            cold_start={},
            memory=None,
            text={},
            arithmetic=None,
            accuracy=None,
            stages={END_TO_END: _stage(9)},
        ),
    ),
}


@pytest.fixture(params=list(ALL))
def report(request: pytest.FixtureRequest) -> BenchReport:
    return _report(ALL[request.param])  # type: ignore[arg-type]


def test_it_is_well_formed(report: BenchReport) -> None:
    page = to_html(report)
    assert page.startswith("<!doctype html>\n<html lang=")
    _Page(page)
    assert _drawings(page)


def test_every_number_of_the_table_is_on_the_page(report: BenchReport) -> None:
    missing = _numbers(report.to_table()) - _numbers(_Page(to_html(report)).text)
    assert missing == set()


def test_nothing_comes_from_elsewhere_and_nothing_runs(report: BenchReport) -> None:
    page = to_html(report)
    parsed = _Page(page)
    assert not {tag for tag, _ in parsed.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
    }
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert name not in ("src", "href", "style"), tag
            assert not name.startswith("on"), (tag, name)
            assert name == "xmlns" or "://" not in (value or "")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", page).count("http") == 0


def test_it_follows_the_reader_into_the_dark() -> None:
    page = to_html(_report())
    assert "@media (prefers-color-scheme: dark)" in page
    style = page[page.index("<style>") : page.index("</style>")]
    used = set(re.findall(r"var\((--[a-z-]+)\)", style))
    light, dark = (
        set(re.findall(r"(--[a-z-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    assert used == light == dark


def test_every_class_of_a_drawing_has_a_colour() -> None:
    page = to_html(_report())
    style = page[page.index("<style>") : page.index("</style>")]
    named = set(re.findall(r"\.([a-z_-]+)", style))
    for drawing in _drawings(page):
        for part in drawing.iter():
            assert set(part.get("class", "").split()) <= named, part.get("class")


EVIL = '<script>alert("1")</script>&amp;\'"]]>'


def test_names_are_text_and_nothing_else() -> None:
    run = _run(1, name=EVIL, missing={EVIL: EVIL}, placement={"backend": EVIL, "device": EVIL, "why": EVIL})
    evil_accuracy = {"dataset": EVIL, EVIL: {"top1": 0.5}}
    runs = (run, _run(2, accuracy=evil_accuracy), _run(3, accuracy=evil_accuracy))
    page = to_html(
        _report(
            runs, subject=EVIL, command=EVIL, host={EVIL: EVIL, "cpu_model": EVIL}, versions={EVIL: EVIL},
            labels=LabelsEntry(n=1, source=EVIL, templates=EVIL),
        )
    )  # fmt: skip
    parsed = _Page(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert EVIL in parsed.text
    assert all(drawing.tag == f"{SVG}svg" for drawing in _drawings(page))


# --- drawings ----------------------------------------------------------------------------------------------


def _boxes(drawing: ET.Element) -> list[tuple[float, float, float, float, str]]:
    """Return left, top, right, bottom of every text, as wide as it may be in any font."""
    found = []
    for text in drawing.iter(f"{SVG}text"):
        said = (text.text or "") + "".join((child.tail or "") for child in text)
        width = text_width(said)
        x, y = float(text.get("x", "0")), float(text.get("y", "0"))
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "start")]
        found.append((left, y - 10, left + width, y + 2, said))
    return found


@pytest.mark.parametrize("which", ["one", "eight"])
def test_texts_of_drawings_do_not_overlap_and_stay_inside(which: str) -> None:
    for drawing in _drawings(to_html(_report(ALL[which]))):  # type: ignore[arg-type]
        _, _, width, height = map(float, drawing.get("viewBox", "").split())
        boxes = _boxes(drawing)
        for left, top, right, bottom, said in boxes:
            assert -1 <= left < right <= width + 1, said
            assert 0 <= top < bottom <= height, said
        for place, one in enumerate(boxes):
            for other in boxes[place + 1 :]:
                apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
                assert apart, (one[4], other[4])


def test_every_target_is_in_every_drawing_and_named_in_full() -> None:
    page = to_html(_report(ALL["eight"]))  # type: ignore[arg-type]
    strips, stages, cold, points = _drawings(page)
    for drawing, rows in ((strips, 8), (stages, 8), (cold, 16)):
        names = [text.findtext(f"{SVG}title") for text in drawing.iter(f"{SVG}text") if len(text)]
        assert len(names) == rows
        assert all(LONG.format(number) in " ".join(map(str, names)) for number in range(1, 9))
    tags = [text.text for text in points.iter(f"{SVG}text") if "small" in text.get("class", "")]
    assert sorted(map(str, tags)) == sorted(map(str, range(1, 9)))
    text = _Page(page).text
    assert all(text.count(LONG.format(number)) >= 2 for number in range(1, 9))


def test_samples_stand_where_the_axis_says() -> None:
    drawing = _parsed(
        strip_plot([Strip("a", "", [10.0, 20.0, 40.0], {"p50": 20.0}, (10.0, 40.0))], title="t", label="ms")
    )
    dots = sorted(float(dot.get("cx", "0")) for dot in drawing.iter(f"{SVG}circle"))
    assert len(dots) == 3
    # from 0, linear: 40 is four times as far as 10
    assert (dots[2] - 14) == pytest.approx(4 * (dots[0] - 14), abs=0.5)
    ticks = {
        text.text: float(text.get("x", "0"))
        for text in drawing.iter(f"{SVG}text")
        if text.get("class") == "soft"
    }
    assert ticks["20"] == pytest.approx(dots[1], abs=0.2)
    (between,) = [each for each in drawing.iter(f"{SVG}rect") if each.get("class") == "between"]
    assert float(between.get("x", "0")) == pytest.approx(dots[0], abs=0.2)
    assert float(between.get("width", "0")) == pytest.approx(dots[2] - dots[0], abs=0.2)


def test_far_apart_samples_are_drawn_on_a_logarithmic_axis() -> None:
    text = strip_plot([Strip("a", "", [1.0, 10.0, 100.0], {})], title="t", label="ms a picture")
    drawing = _parsed(text)
    dots = sorted(float(dot.get("cx", "0")) for dot in drawing.iter(f"{SVG}circle"))
    assert dots[1] - dots[0] == pytest.approx(dots[2] - dots[1], abs=0.2)
    assert "ms a picture, logarithmic" in text


def test_very_many_samples_keep_their_ends() -> None:
    samples = np.random.default_rng(0).uniform(5, 9, 40_000).tolist()
    drawing = _parsed(strip_plot([Strip("a", "", samples, {})], title="t", label="ms"))
    dots = sorted(float(dot.get("cx", "0")) for dot in drawing.iter(f"{SVG}circle"))
    assert len(dots) == 500
    end = 14 + (WIDTH - 40) / 1.04
    assert dots[-1] == pytest.approx(end, abs=0.5)
    assert dots[0] == pytest.approx(14 + (end - 14) * min(samples) / max(samples), abs=0.5)


def test_bars_are_as_long_as_their_parts() -> None:
    bars = [Bar("a", "", [Part("x", 30.0), Part("y", 10.0)], 45.0), Bar("b", "", [Part("x", 20.0)])]
    drawing = _parsed(stack_plot(bars, {"x": "first", "y": "second"}, title="t", label="ms", mark_label="m"))
    rects = [
        (each.get("class"), float(each.get("x", "0")), float(each.get("width", "0")))
        for each in drawing.iter(f"{SVG}rect")
        if each.get("rx") is None
    ]
    assert [kind for kind, _, _ in rects] == ["fill-x", "fill-y", "fill-x"]
    assert rects[0][2] == pytest.approx(3 * rects[1][2], abs=0.3)
    assert rects[0][2] == pytest.approx(1.5 * rects[2][2], abs=0.3)
    assert rects[1][1] == pytest.approx(rects[0][1] + rects[0][2], abs=0.2)
    (mark,) = [
        float(each.get("x1", "0"))
        for each in drawing.iter(f"{SVG}line")
        if each.get("class") == "mark" and each.get("y1") != "6"
    ]
    assert mark > rects[1][1] + rects[1][2]


def test_what_no_other_beats_is_marked() -> None:
    # 2 is slower and larger than 1 and no better; 3 is the best and slowest; 4 is as good as 1 and smaller
    def run(number: int, ms: float, top1: float, size_bytes: int) -> BenchRun:
        stages = {END_TO_END: _stage(ms, seed=1)}
        return _run(number, stages=stages, accuracy={"top1": top1}, size_bytes=size_bytes)

    runs = (run(1, 10, 0.6, 9), run(2, 11, 0.6, 10), run(3, 90, 0.7, 10), run(4, 12, 0.6, 8))
    points = _drawings(to_html(_report(runs)))[-1]
    best = {
        title.text
        for each in points.iter(f"{SVG}circle")
        if each.get("class") == "point best" and (title := each.find(f"{SVG}title")) is not None
    }
    assert best == {"onnx-int8,threads=1", "onnx-int8,threads=3", "onnx-int8,threads=4"}


def test_tags_of_points_in_one_place_stand_side_by_side() -> None:
    dots = [Dot(f"d{n}", str(n), 50.0, 0.5, 1.0, best=False) for n in range(12)]
    drawing = _parsed(scatter_plot(dots, title="t", x_label="ms", y_label="top1"))
    at = sorted(
        float(each.get("cx", "0")) for each in drawing.iter(f"{SVG}circle") if each.get("class") == "tag"
    )
    assert len(at) == 12
    assert min(right - left for left, right in itertools.pairwise(at)) >= 22
    assert at[0] >= 11
    assert at[-1] <= WIDTH - 11


def test_attributes_are_escaped() -> None:
    found = _parsed(element("text", "a", class_='"><b x="', font_size=12))
    assert found.attrib == {"class": '"><b x="', "font-size": "12"}


def test_marks_in_one_place_share_a_name() -> None:
    rows = [Strip("a", "", [1.0, 100.0, 100.4, 101.0], {"p50": 100.0, "p90": 100.4, "p99": 101.0})]
    drawing = _parsed(strip_plot(rows, title="t", label="ms"))
    assert sum(each.get("class") == "mark" for each in drawing.iter(f"{SVG}line")) == 3
    names = [each.text for each in drawing.iter(f"{SVG}text") if "small" in each.get("class", "")]
    assert names == ["p50"]


def test_pieces_too_small_for_their_number_have_none() -> None:
    bars = [Bar("a", "", [Part("x", 0.4), Part("y", 400.0)])]
    text = stack_plot(bars, {"x": "first", "y": "second"}, title="t", label="ms")
    inside = [
        each.text for each in _parsed(text).iter(f"{SVG}text") if each.get("class", "").startswith("on-")
    ]
    assert inside == ["400"]
    assert "first: 0.40" in text


@pytest.mark.parametrize("width", [60.0, 200.0, 5000.0])
def test_shortened_names_fit_and_keep_their_ends(width: float) -> None:
    name = LONG.format(4) + "的" * 20
    said = shorten(name, width)
    assert text_width(said) <= width
    assert (said == name) == (width == 5000)
    if said != name:
        head, tail = said.split("…")
        assert name.startswith(head)
        assert name.endswith(tail)


# --- what is missing ---------------------------------------------------------------------------------------


def test_what_is_missing_is_said_where_it_would_stand() -> None:
    run = _run(1, cold_start={}, accuracy=None, missing={"cold_start": "it was not asked for"})
    text = _Page(to_html(_report((run,)))).text
    assert "No cold starts were measured: it was not asked for." in text
    assert "no manifest of these targets carries an accuracy" in text
    other = _run(2, accuracy={"dataset": "other", "zh": {"recall_at_1": 0.4}})
    text = _Page(to_html(_report((_run(1), other, _run(3))))).text
    assert "Not drawn, because their manifests carry no en.top1: onnx-int8,threads=2." in text


def test_disturbed_runs_are_flagged_at_the_top() -> None:
    drift = DriftEntry(ratio=1.2, low=1.1, high=1.3)
    run = _run(1, interference=InterferenceEntry(steal_share=0.07, drift=drift))
    text = _Page(to_html(_report((run, _run(2)), steal_share=0.08))).text
    assert "onnx-int8,threads=1: the hypervisor gave 7.0% of the time to others" in text
    assert "its last third ran 20.0% slower than its first" in text
    assert "The hypervisor gave 8.0% of the run to others" in text
    assert text.count("disturbed") == 1
    assert "warning" not in to_html(_report(2)).split("</style>")[1]


def test_batches_are_drawn_by_the_picture_and_that_is_said() -> None:
    stages = {END_TO_END: _stage(800.0, batch=8)}
    page = to_html(_report((_run(1, batch=8, stages=stages), _run(2))))
    assert "Calls of several pictures are divided by their number." in page
    strips = _drawings(page)[0]
    note = next(box[4] for box in _boxes(strips) if box[4].startswith("p50 ") and "," in box[4])
    assert float(note.split()[1]) == pytest.approx(stages[END_TO_END].wall_ms / 8, abs=0.01)
    alone = _drawings(to_html(_report((_run(1, batch=8, stages=stages),))))[0]
    ticks = [each.text for each in alone.iter(f"{SVG}text") if each.get("class") == "soft"]
    most = max(float(tick) for tick in ticks if tick is not None and re.fullmatch(r"[\d.]+", tick))
    assert 100 <= most <= max(stages[END_TO_END].samples_ms) / 8 * 1.05


def test_it_says_how_to_repeat_it() -> None:
    text = _Page(to_html(_report())).text
    for said in ("edgeclip bench default --threads 1,2", "ab" * 32, "cd" * 32, "Some CPU", "numpy 2.4.1"):
        assert said in text


def test_the_same_report_is_the_same_page() -> None:
    report = _report()
    again = BenchReport.from_json(report.to_json())
    assert to_html(msgspec.structs.replace(again)) == to_html(report)
