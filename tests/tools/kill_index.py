"""Kill processes that index a folder at random moments of their work, and check what the index holds then.

``kill_index.py FOLDER INDEX BUNDLE COUNT SEED``: before each run a few pictures come, change and go, so that
every run has work. After each kill the index opens and is sound, with what the last finished run wrote.
Prints one JSON line of what was seen; exits with a traceback where something was wrong.

The children are forks of this process, which has imported what they need and opened nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from edgeclip.classify import ZeroShotClassifier
from edgeclip.index import made_with, update_index
from edgeclip.index_file import PictureIndex
from edgeclip.runtime.session import RuntimeOptions

RECORD_BYTES = 150


def update(folder: Path, index: Path, bundle: str) -> None:
    """Bring the index up to date."""
    with ZeroShotClassifier.open(bundle, options=RuntimeOptions(threads=1)) as classifier:
        update_index(folder, classifier, made_with(classifier.bundle, classifier.choice.variant), path=index)


def state(index: Path) -> dict[str, str]:
    """Return a digest of each embedding by path, of an index that must be sound; ``{}`` for none."""
    if not index.exists():
        return {}
    opened = PictureIndex(index)
    opened.check()
    return {
        path: hashlib.sha256(row.tobytes()).hexdigest()
        for path, row in zip(opened.paths, opened.embeddings, strict=True)
    }


def disturb(folder: Path, draw: random.Random) -> None:
    """Copy, change, move and remove a few pictures."""
    pictures = sorted(folder.iterdir())
    for number, path in enumerate(draw.sample(pictures, min(len(pictures), 20))):
        other = pictures[draw.randrange(len(pictures))]
        if number % 4 == 0:
            path.unlink()
        elif number % 4 == 1:
            path.rename(path.with_name(f"{path.stem}m.{path.suffix}"))
        elif other.exists() and path.exists():
            path.with_name(f"{path.stem}c{path.suffix}").write_bytes(path.read_bytes() + b"\0" * number)


def wait(child: int, index: Path, journal_bytes: int | None) -> None:
    """Wait until the journal has grown by so much, or until the index is written; or until the end."""
    journal, new = (index.with_name(f"{index.name}.{end}") for end in ("journal", "new"))
    before = journal.stat().st_size if journal.exists() else 0
    left = new.stat().st_mtime_ns if new.exists() else 0  # by an earlier kill
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with suppress(FileNotFoundError):
            if journal_bytes is None and new.stat().st_mtime_ns != left:
                return
            if journal_bytes is not None and journal.stat().st_size > before + journal_bytes:
                return
        time.sleep(0.0005)


def main(folder: Path, index: Path, bundle: str, count: int, seed: int) -> dict[str, int]:
    """Kill ``count`` runs, then let one through and compare with an index made at once."""
    draw = random.Random(seed)
    whole = index.with_name("at-once")
    committed: dict[str, str] = {}
    seen = {"kills": 0, "finished": 0, "resumed_from": 0, "commits": 0}
    while seen["kills"] < count:
        child = os.fork()
        if child == 0:
            update(folder, index, bundle)
            os._exit(0)
        # by how far it is, not by the clock: machines are busy
        records = draw.uniform(0, 20 if committed else len(list(folder.iterdir())) / 3)
        wait(child, index, None if draw.random() < 0.25 else int(records * RECORD_BYTES))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found = state(index)
        if os.WIFSIGNALED(status):
            seen["kills"] += 1
            # the old index or the new one, and the new one is of everything that is there
            assert found == committed or set(found) == {path.name for path in folder.iterdir()}
        else:
            assert status == 0
            seen["finished"] += 1
        seen["commits"] += found != committed
        committed = found
        journal = index.with_name(f"{index.name}.journal")
        seen["resumed_from"] += journal.exists() and journal.stat().st_size > 4096
        disturb(folder, draw)
    child = os.fork()
    if child == 0:
        update(folder, index, bundle)
        update(folder, whole, bundle)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert state(index) == state(whole), "differs from an index that was made at once"
    left = {path.name for path in index.parent.iterdir() if path.name.startswith(index.name)}
    assert left == {index.name}, left
    return {**seen, "pictures": len(state(index))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:6]))))
