"""``edgeclip classify -`` by itself: the options of a model, of labels and of a stream, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import edgeclip.cli
from edgeclip.cli._options import LabelChoice, ModelChoice, Notes, label_options, model_options
from edgeclip.cli._stream import Shown, StreamChoice, is_stream, run_stream, stream_options


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@model_options
@label_options
@stream_options
@click.option("--top-k", type=int, default=5)
@click.option("--min-confidence", type=float, default=0.0)
@click.option("--json", "form", flag_value="json")
@click.option("--jsonl", "form", flag_value="jsonl")
@click.option("--strict", is_flag=True)
@click.option("--timing", is_flag=True)
@click.option("--reject", is_flag=True)
def stream(paths: tuple[Path, ...], **given: Any) -> None:
    """Decide on a stream."""
    from edgeclip.answers import Answers
    from edgeclip.classify import ZeroShotClassifier

    choice = StreamChoice(given["raw"], given["every"], given["smooth"], given["all_frames"])
    choice.check(stream=is_stream(paths, None), form=given["form"], others={"--timing": given["timing"]})
    offered = LabelChoice(*(given[name] for name in ("labels", "label_file", "templates", "language")))
    names = ("bundle", "variant", "backend", "device", "threads", "cache_dir", "allow")
    model = ModelChoice(*(given[name] for name in names))
    notes = Notes()
    with ZeroShotClassifier.open(
        model.bundle,
        variant=model.variant,
        options=model.options(),
        answers=Answers(reject=given["reject"]),
    ) as classifier:
        offered.apply(classifier, notes)
        shown = Shown(given["form"], given["top_k"], given["min_confidence"])
        run_stream(classifier, choice, offered, notes, shown=shown, strict=given["strict"])


if __name__ == "__main__":
    edgeclip.cli._COMMANDS["stream"] = ("stream_command:stream", "")
    edgeclip.cli.main(["stream", *__import__("sys").argv[1:]])
