"""``edgeclip cache``: show or clear what edgeclip keeps on this host."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from ._options import SCHEMA, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.cache import CacheEntry, CacheInfo

__all__ = ["cache"]


@click.group()
def cache() -> None:
    """Show or clear what edgeclip keeps on this host: engines, label vectors, profiles.

    Everything in it can be made again; EDGECLIP_CACHE_DIR says where it is.

    Example: edgeclip cache info
    """


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(as_json: bool) -> None:
    """Show where the cache is and what it holds for each bundle, and compiled for all of them.

    Example: edgeclip cache info
    """
    from edgeclip.cache import COMPILED, cache_info

    prepare_stdout()
    found = cache_info()
    if as_json:
        click.echo(json.dumps(_document(found), ensure_ascii=False, indent=2))
        return
    click.echo(f"{shown(found.root)}: {_size(found.size_bytes)}")
    for entry in found.entries:
        changed = time.strftime("%Y-%m-%d", time.localtime(entry.used_s)) if entry.used_s else "never"
        files = f"{entry.files} file{'' if entry.files == 1 else 's'}"
        count = len(entry.hosts)
        hosts = "all hosts" if entry.bundle == COMPILED else f"{count} host{'' if count == 1 else 's'}"
        name, size = _name(entry.bundle), _size(entry.size_bytes)
        profiles = _profiles(found, entry)
        tuned = f", {profiles} tuned profile{'' if profiles == 1 else 's'}" if profiles else ""
        click.echo(f"  {name:<23}  {size:>10}  {files}, {hosts}, {changed}{tuned}")


@cache.command()
@click.option(
    "--bundle",
    metavar="DIGEST",
    help="Only what belongs to this bundle (first digits suffice), or 'compiled': only compiled towers.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def clear(ctx: click.Context, bundle: str | None, yes: bool, as_json: bool) -> None:
    """Remove what the cache holds; the next run makes anew what it needs.

    Compiled towers belong to no bundle, because bundles share them: they go with everything, or alone.
    Engines of TensorRT need 'edgeclip compile' afterwards.

    Example: edgeclip cache clear --yes
    """
    from edgeclip.cache import cache_info, clear_cache

    prepare_stdout()
    found = cache_info()
    # Digests that name no entry, or several, are refused below: nobody is asked about them.
    meant = [entry for entry in found.entries if bundle is not None and entry.bundle.startswith(bundle[:16])]
    asked = bool(found.entries) if bundle is None else len(meant) == 1
    if asked and not yes:
        what = "everything" if bundle is None else _name(meant[0].bundle)
        if not _confirmed(f"Remove {what} in {shown(found.root)}?"):
            click.echo("edgeclip: nothing was removed", err=True)
            ctx.exit(1)
    removed = clear_cache(bundle=bundle)
    if as_json:
        click.echo(json.dumps(_document(removed), ensure_ascii=False, indent=2))
    else:
        names = ", ".join(_name(entry.bundle) for entry in removed.entries)
        click.echo(f"removed {_size(removed.size_bytes)}: {names or 'there was nothing'}")


def _confirmed(question: str) -> bool:
    """Ask, on stderr, for a yes or no.

    Raises:
        InputError: nobody can answer, as in a script.
    """
    from edgeclip.errors import InputError

    try:
        return click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():  # Ctrl-C or Ctrl-D
            raise
        click.echo(err=True)
        raise InputError("'cache clear' asks first, and standard input holds no answer: say --yes.") from None


def _name(bundle: str) -> str:
    from edgeclip.cache import COMPILED

    return "compiled towers" if bundle == COMPILED else f"bundle {bundle}"


def _profiles(info: CacheInfo, entry: CacheEntry) -> int:
    return len(list((info.root / entry.bundle).glob("*/profile*.json")))


def _document(info: CacheInfo) -> dict[str, object]:
    entries = [
        {
            "bundle": entry.bundle,
            "hosts": list(entry.hosts),
            "files": entry.files,
            "size_bytes": entry.size_bytes,
            "changed_s": entry.used_s,
            "profiles": _profiles(info, entry),
        }
        for entry in info.entries
    ]
    return {"schema": SCHEMA, "root": str(info.root), "size_bytes": info.size_bytes, "bundles": entries}


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:,.1f} kB"
