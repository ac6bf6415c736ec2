"""Write bundles in processes that are killed, and check after each kill that a complete bundle is there.

``kill_writer.py random DIRECTORY COUNT SEED``: a process writes version after version until SIGKILL comes at
a random moment. ``kill_writer.py steps DIRECTORY``: one write is killed before its first, second, third… step
on the disk, until one gets through. Prints one JSON line of what was seen; exits with a traceback where a
bundle was not complete.

The children are forks of this process, which has one thread and has imported what they need.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError

FILES = {"onnx-fp32/image.onnx": 300_000, "onnx-fp32/image.data": 150_000, "golden.safetensors": 50_000}
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}


def content(version: int, name: str) -> bytes:
    """Return what a file holds in a version; the same size in all, so that only hashes tell."""
    seed = hashlib.sha256(f"{version} {name}".encode()).digest()
    return (seed * (FILES[name] // len(seed) + 1))[: FILES[name]]


def write(directory: Path, version: int) -> None:
    """Write one version; every third keeps the image tower of the last, as adding a variant does."""
    with BundleWriter(directory) as writer:
        if "model" not in writer.manifest or version % 3:
            names = [writer.add(name, content(version, name)) for name in FILES if name.startswith("onnx")]
            image = {"name": "image", "dtype": "uint8", "shape": ["B", 8, 8, 3]}
            output = {"name": "image_embedding", "dtype": "float32", "shape": ["B", 4]}
            tower = {"model": names[0], "files": names, "inputs": [image], "outputs": [output]}
            writer.manifest["variants"] = {
                "onnx-fp32": {"format": "onnx", "precision": "fp32", "towers": {"image": tower}}
            }
        writer.manifest.update(
            model={
                "name": "kill",
                "family": "test",
                "embed_dim": 4,
                "scale": 10,
                "licence": "Apache-2.0",
                "embedding_space": "0" * 64,
            },
            preprocess={"image_size_px": [8, 8]},
            golden=writer.add("golden.safetensors", content(version, "golden.safetensors")),
            version=version,
        )
        writer.commit()


def check(directory: Path, least: int) -> int:
    """Return the version that is there, complete; ``-1`` for none, right only before the first commit."""
    try:
        bundle = Bundle.open(directory)
    except BundleError as error:
        if least < 0 and ("has no manifest.json" in str(error) or "does not exist" in str(error)):
            return -1
        raise
    bundle.check_files()
    version = int(bundle.raw["version"])
    assert version >= least, f"version {version} after {least} was committed"
    assert bundle.read(bundle.manifest.golden or "") == content(version, "golden.safetensors")
    return version


def kill_at_random(directory: Path, count: int, seed: int) -> dict[str, int]:
    """Kill a writing process ``count`` times; each of its versions may or may not have got through."""
    rng = random.Random(seed)
    start = time.perf_counter()
    write(directory.with_name("probe"), 0)
    write_s = time.perf_counter() - start  # a disk that syncs slowly asks for later kills
    committed, mid_write, versions = -1, 0, set()
    for _ in range(count):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write_end, b"go\n")
            version = committed
            while True:
                version += 1
                write(directory, version)
                os.write(write_end, b"%d\n" % version)
        os.close(write_end)
        said = os.read(read_end, 3)
        time.sleep(rng.uniform(0, 3 * write_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while block := os.read(read_end, 1 << 16):
            said += block
        os.close(read_end)
        announced = [int(line) for line in said.split(b"\n")[1:-1] if line]
        committed = check(directory, max([committed, *announced]))
        versions.add(committed)
        mid_write += any(path.name.startswith(".edgeclip") for path in directory.rglob("*"))
    write(directory, committed + 1)  # whatever the last kill left behind is in nobody's way
    assert check(directory, committed + 1) == committed + 1
    left = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {"kills": count, "mid_write": mid_write, "versions": len(versions), "files": len(left)}


def kill_at_each_step(directory: Path) -> dict[str, int]:
    """Kill one write before its n-th step, for every n; the old version is there, or the new one."""
    write(directory, 0)
    version, new, step = 0, 0, 0
    while True:
        step += 1
        child = os.fork()
        if child == 0:
            left = step

            def count(event: str, _: object) -> None:
                nonlocal left
                if event in STEPS:
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            write(directory, version + 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = check(directory, version)
        assert found in (version, version + 1)
        new += found == version + 1
        version = found
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            return {"steps": step - 1, "new": new}


if __name__ == "__main__":
    mode, place = sys.argv[1], Path(sys.argv[2])
    seen = (
        kill_at_random(place, int(sys.argv[3]), int(sys.argv[4]))
        if mode == "random"
        else kill_at_each_step(place)
    )
    print(json.dumps(seen))
