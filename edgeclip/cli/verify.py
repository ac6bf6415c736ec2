"""``edgeclip verify``: does this bundle give the right numbers on this machine?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeclip.tables import aligned

from ._options import BACKENDS, Notes, bundle_directory, cache_dir_option

if TYPE_CHECKING:
    from edgeclip.export.verify import VerifyReport

__all__ = ["verify"]


@click.command(epilog="Example: edgeclip verify default --variant onnx-int8 --require-verified")
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option("--variant", default="all", show_default=True, help="Name of one variant, or all.")
@click.option(
    "--backend",
    type=click.Choice([name for name in BACKENDS if name != "eager"]),
    default="auto",
    show_default=True,
    help="Engine that runs them; auto takes that of each variant's format.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads a call may use; all usable cores without."
)
@click.option(
    "--device",
    help="cpu, cuda or cuda:N; for OpenVINO gpu, gpu:N or npu too.  [default: cuda for TensorRT, else cpu]",
)
@cache_dir_option
@click.option("--require-verified", is_flag=True, help="Fail where a variant cannot be run on this host.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    bundle: str,
    variant: str,
    backend: str,
    threads: int | None,
    device: str | None,
    cache_dir: Path | None,
    require_verified: bool,
    as_json: bool,
) -> None:
    """Check every file of BUNDLE and the numbers of its variants on this host.

    BUNDLE is a directory, or hf:ORG/NAME@REV on the hub; without, the bundle that comes with edgeclip.
    Every variant that can be run here is, as the manifest asks for or as --backend and --device say.
    Ends with 4 where numbers are beyond their limits, with 1 where files are damaged.
    """
    from edgeclip.bundle import Bundle
    from edgeclip.export.verify import verify_bundle
    from edgeclip.runtime.session import RuntimeOptions

    options = RuntimeOptions(backend, device=device or "cpu", threads=threads, cache_dir=cache_dir)
    opened = Bundle.open(bundle_directory(bundle, Notes()))
    report = verify_bundle(opened, variant=variant, options=options, device_of_format=device is None)
    click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if as_json else _table(report))
    report.raise_for(require_verified=require_verified)


def _table(report: VerifyReport) -> str:
    sound = report.files - len(report.damaged)
    lines = [f"{report.bundle}: {sound} of {report.files} files are as the manifest says"]
    rows: list[tuple[str, ...]] = [
        ("variant", "tower", "n", "max abs", "cosine min", "cosine mean", "top-1", "top-5", "")
    ]
    for verdict in report.variants:
        towers = {} if verdict.golden is None else verdict.golden.towers
        for name, tower in towers.items():
            numbers = tower.numbers
            rows.append(
                (
                    verdict.name,
                    name,
                    str(numbers.n),
                    f"{numbers.max_abs:.1e}",
                    f"{numbers.cosine_min:.6f}",
                    f"{numbers.cosine_mean:.6f}",
                    _share(numbers.top1_agreement),
                    _share(numbers.top5_agreement),
                    "passed" if tower.passed else "FAILED",
                )
            )
        if not towers:
            rows.append((verdict.name, *["-"] * 7, verdict.status))
    lines += aligned(rows, range(2, 8))
    lines += [
        f"{verdict.name}: {verdict.status}: {verdict.reason}" for verdict in report.variants if verdict.reason
    ]
    return "\n".join([*lines, *report.damaged])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
