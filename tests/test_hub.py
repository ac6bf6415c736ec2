"""Downloads through the hub's real client, from a small hub on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BundleError, InputError, MissingExtraError
from edgeclip.hub import (
    BundleReference,
    Pulled,
    WantedFile,
    fetch_bundle,
    parse_bundle_reference,
    pull,
    receipt_path,
    weights_directory,
)
from edgeclip.hub_client import HubClient
from edgeclip.models.zoo import MODELS

REPO = "maker/model"
BIG = bytes(range(256)) * 1024
BIG_SHA256 = hashlib.sha256(BIG).hexdigest()
# More than one block of the client, which is what it hands on at once.
HUGE = BIG * 96


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Return a hub that the client in this process takes for the real one."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 14)
    # The client waits a second before each of its five retries.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with LoopbackHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def take(directory: Path, *files: str, **wanted: str | None) -> Pulled:
    return pull(
        WantedFile(repo=REPO, files=files or ("weights.bin",), **wanted),  # type: ignore[arg-type]
        directory,
        licence="MIT",
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- one file ----------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_checked_and_receipted(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.commit(REPO, {"weights.bin": BIG, "README.md": b"words"})
    steps: list[tuple[str, int, int]] = []
    pulled = pull(
        WantedFile(repo=REPO, files=("weights.bin",), sha256=BIG_SHA256),
        tmp_path / "new" / "place",
        licence="apple-amlr",
        accepted=True,
        progress=lambda *step: steps.append(step),
    )
    assert pulled.downloaded
    assert pulled.path.read_bytes() == BIG
    assert names(pulled.path.parent) == ["weights.bin", "weights.bin.receipt.json"]
    receipt = json.loads(receipt_path(pulled.path).read_bytes())
    assert receipt.pop("downloaded").endswith("+00:00")
    assert receipt == {
        "repo": REPO,
        "revision": commit,
        "file": "weights.bin",
        "sha256": BIG_SHA256,
        "size_bytes": len(BIG),
        "licence": "apple-amlr",
        "accepted": True,
        "schema": 1,
    }
    assert steps[0] == ("weights.bin", 0, len(BIG))
    assert steps[-1] == ("weights.bin", len(BIG), len(BIG))


def test_a_second_call_checks_the_file_and_asks_nobody(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    first = take(tmp_path)
    asked = len(hub.requests)
    hub.commit(REPO, {"weights.bin": b"new" * 9000})  # the branch moves on; the recorded commit stays
    second = take(tmp_path)
    assert (second.downloaded, second.receipt) == (False, first.receipt)
    assert len(hub.requests) == asked


def test_a_lost_file_is_downloaded_again_at_the_recorded_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.commit(REPO, {"weights.bin": BIG})
    take(tmp_path).path.unlink()
    hub.commit(REPO, {"weights.bin": b"new" * 9000})
    again = take(tmp_path)
    assert (again.downloaded, again.receipt.revision) == (True, old)
    again.path.write_bytes(b"damaged")
    assert take(tmp_path).path.read_bytes() == BIG


def test_another_revision_is_taken_only_when_it_is_said(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG}, "v1")
    take(tmp_path)
    new = hub.commit(REPO, {"weights.bin": b"new" * 9000}, "v2")
    moved = take(tmp_path, revision="v2")
    assert (moved.receipt.revision, moved.path.read_bytes()) == (new, b"new" * 9000)
    assert take(tmp_path).receipt.revision == new
    assert take(tmp_path, revision=new).downloaded is False


def test_a_default_revision_stands_for_the_first_download_only(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.commit(REPO, {"weights.bin": BIG})
    new = hub.commit(REPO, {"weights.bin": b"new" * 9000})
    assert take(tmp_path, default_revision=old).receipt.revision == old
    assert take(tmp_path / "b", default_revision=old, revision="main").receipt.revision == new


def test_the_first_name_that_the_repository_has_is_taken(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"model.bin": BIG, "folder/model.safetensors": BIG})
    assert (
        take(tmp_path, "none.bin", "folder/model.safetensors", "model.bin").path.name == "model.safetensors"
    )


def test_a_small_file_without_sha256_is_checked_by_its_git_hash(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": b"small"})
    assert take(tmp_path).path.read_bytes() == b"small"
    hub.faults.corrupt = True
    with pytest.raises(InputError, match=r"'weights.bin' of 'maker/model'.*git blob"):
        take(tmp_path / "b")
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


def test_the_token_stays_with_the_hub_and_nothing_is_counted(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    take(tmp_path)
    assert {request.authorization for request in hub.of("hub", "GET")} == {"Bearer secret"}
    assert [request.authorization for request in hub.of("storage", "GET")] == [None]
    assert {request.path.split("?")[0].split("/")[1] for request in hub.requests} == {"api", "maker", "blobs"}


def test_telemetry_is_off_when_the_client_is_imported_here(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    _pull_elsewhere(tmp_path, hub).communicate(timeout=60)
    agents = {request.user_agent for request in hub.requests}
    assert len(agents) == 1
    assert agents.pop().startswith("edgeclip/")
    assert not any("torch" in request.user_agent or "agent" in request.path for request in hub.requests)


# --- what goes wrong ---------------------------------------------------------------------------------------


def test_a_wrong_hash_is_an_error_and_leaves_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    hub.faults.corrupt = True
    with pytest.raises(InputError, match=rf"arrived has sha256 [0-9a-f]{{64}}.*the hub says {BIG_SHA256}"):
        take(tmp_path)
    assert names(tmp_path) == []


def test_a_hash_that_contradicts_the_table_is_refused_before_downloading(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    with pytest.raises(
        InputError, match=rf"the table of models says sha256 {'0' * 64}, the hub says {BIG_SHA256}"
    ):
        take(tmp_path, sha256="0" * 64)
    assert hub.of("storage", "GET") == []
    assert names(tmp_path) == []


def test_a_rewritten_commit_contradicts_the_receipt(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.commit(REPO, {"weights.bin": BIG})
    take(tmp_path).path.unlink()
    found = hub.find(REPO, commit)
    assert found is not None
    found[1]["weights.bin"] = b"other" * 9000
    with pytest.raises(InputError, match=rf"receipt.json'? says sha256 {BIG_SHA256}, the hub says"):
        take(tmp_path)


def test_a_truncated_download_continues_where_it_stopped(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    hub.faults.cut_after = 100_000
    with pytest.raises(
        InputError, match=r"'weights.bin' of 'maker/model' arrived incomplete.*it continues there"
    ):
        take(tmp_path)
    (part,) = names(tmp_path)
    assert part.startswith(".weights.bin.")
    have = (tmp_path / part).stat().st_size
    assert 0 < have <= 100_000
    hub.faults.cut_after = None
    hub.requests.clear()
    assert take(tmp_path).path.read_bytes() == BIG
    assert [request.byte_range for request in hub.of("storage", "GET")] == [f"bytes={have}-"]
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


def test_the_part_of_a_revision_given_up_goes_when_another_is_complete(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    hub.faults.cut_after = 100_000
    with pytest.raises(InputError, match=r"'weights.bin' of 'maker/model' arrived incomplete"):
        take(tmp_path)
    hub.faults.cut_after = None
    hub.commit(REPO, {"weights.bin": b"new" * 9000})
    assert take(tmp_path).path.read_bytes() == b"new" * 9000
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "answers 404: there is no such repository, or it is private"),
        (401, "RepoNotFound", "answers 401: there is no such repository, or it is private"),
        (403, "GatedRepo", "is gated: accept its terms on http://127.0.0.1.*HF_TOKEN"),
        (401, "GatedRepo", "is gated: accept its terms"),
        (403, "", "answers 403: set HF_TOKEN to a token that may read it"),
        (500, "", "answers 500: try again later"),
        (503, "", "answers 503: try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    hub: LoopbackHub, tmp_path: Path, status: int, code: str, words: str
) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    hub.faults.status, hub.faults.error_code = status, code
    with pytest.raises(InputError, match=rf"'maker/model'.*{words}") as caught:
        take(tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_missing_repositories_revisions_and_files_are_told_apart(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'maker/model' was not downloaded: .* answers 401: there is no such"
    ):
        take(tmp_path)
    hub.commit(REPO, {"weights.bin": BIG})
    with pytest.raises(InputError, match=r"'maker/model' at 'v9'.*has no such revision"):
        take(tmp_path, revision="v9")
    with pytest.raises(InputError, match=r"has none of a.bin, b.bin; it has weights.bin"):
        take(tmp_path, "a.bin", "b.bin")


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://127.0.0.1:9", r"http://127.0.0.1:9 cannot be reached \(Connection refused\)"),
        ("http://no-such-host.invalid", r"http://no-such-host.invalid cannot be reached \(.*\)"),
    ],
)
def test_without_network_it_says_so(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(InputError, match=f"'maker/model' was not downloaded: {words}; check the network"):
        take(tmp_path)


def test_the_clients_offline_switch_is_respected(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids the network"):
        take(tmp_path)
    assert hub.requests == []


def test_files_of_others_are_not_replaced(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    hub.commit("maker/other", {"weights.bin": BIG})
    (tmp_path / "weights.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"weights.bin' exists and was not downloaded by edgeclip"):
        take(tmp_path)
    assert (tmp_path / "weights.bin").read_bytes() == b"mine"
    (tmp_path / "weights.bin").unlink()
    take(tmp_path)
    with pytest.raises(InputError, match="is from 'maker/model', not from 'maker/other'"):
        pull(WantedFile(repo="maker/other", files=("weights.bin",)), tmp_path, licence="MIT")


def test_a_directory_that_cannot_be_written_is_an_error(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/below' cannot be written: not a directory"):
        take(tmp_path / "file" / "below")


def test_a_file_larger_than_the_disk_is_refused_before_downloading(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    hub.commit(REPO, {"weights.bin": BIG})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        InputError, match=r"'weights.bin' of 'maker/model' needs 0 MB in .*, which has 0 MB free"
    ):
        take(tmp_path)
    assert hub.of("storage", "GET") == []


def test_a_disk_that_fills_up_leaves_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": HUGE})
    process = _pull_elsewhere(tmp_path, hub, largest_bytes=1 << 20)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"weights.bin' cannot be written: {os.strerror(errno.EFBIG).lower()}; make room" in said
    assert names(tmp_path) == []


def test_without_the_extra_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edgeclip\[hub\]"'):
        take(tmp_path)


# --- interruption and company ------------------------------------------------------------------------------

_SCRIPT = """
import resource, sys
from pathlib import Path
from edgeclip.errors import EdgeClipError
from edgeclip.hub import WantedFile, pull
directory, largest = Path(sys.argv[1]), int(sys.argv[2])
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
try:
    print(pull(WantedFile(repo="maker/model", files=("weights.bin",)), directory, licence="MIT").downloaded)
except EdgeClipError as error:
    sys.exit(str(error))
"""


def _pull_elsewhere(directory: Path, hub: LoopbackHub, *, largest_bytes: int = 0) -> subprocess.Popen[str]:
    """Start a process that pulls the same file."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(directory), str(largest_bytes)],
        env={**environment, "HF_ENDPOINT": hub.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_download_continues(hub: LoopbackHub, tmp_path: Path, how: signal.Signals) -> None:
    hub.commit(REPO, {"weights.bin": HUGE})
    hub.faults.hold, hub.faults.hold_after = threading.Event(), 15_000_000
    process = _pull_elsewhere(tmp_path, hub)
    assert hub.holding.wait(60)
    (part,) = [path for path in _parts(tmp_path) if path.stat().st_size]
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    have = part.stat().st_size
    assert 0 < have < len(HUGE)
    assert not (tmp_path / "weights.bin").exists()
    hub.faults.hold.set()
    hub.faults.hold = None
    hub.requests.clear()
    assert take(tmp_path).path.read_bytes() == HUGE
    assert [request.byte_range for request in hub.of("storage", "GET")] == [f"bytes={have}-"]
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


def test_an_end_between_receipt_and_file_costs_no_second_download(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": BIG})
    path = take(tmp_path).path
    path.rename(tmp_path / f".weights.bin.{BIG_SHA256[:16]}.part")
    hub.requests.clear()
    assert take(tmp_path).path.read_bytes() == BIG
    assert hub.of("storage", "GET") == []
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


def _parts(directory: Path) -> list[Path]:
    """Wait until something has arrived."""
    for _ in range(200):
        found = [path for path in directory.glob(".*.part") if path.stat().st_size]
        if found:
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"nothing arrived in {directory}")


def test_two_processes_at_once_download_once(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit(REPO, {"weights.bin": HUGE})
    hub.faults.hold, hub.faults.hold_after = threading.Event(), 1000
    first = _pull_elsewhere(tmp_path, hub)
    assert hub.holding.wait(60)
    second = _pull_elsewhere(tmp_path, hub)
    threading.Event().wait(0.5)
    hub.faults.hold.set()
    said = sorted(process.communicate(timeout=60)[0].strip() for process in (first, second))
    assert said == ["False", "True"]
    assert len(hub.of("storage", "GET")) == 1
    assert names(tmp_path) == ["weights.bin", "weights.bin.receipt.json"]


# --- bundles -----------------------------------------------------------------------------------------------


def bundle_files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf:maker/model@v1.0", BundleReference("maker/model", "v1.0")),
        ("hf:maker/model@refs/pr/3", BundleReference("maker/model", "refs/pr/3")),
        ("hf:maker/model", BundleReference("maker/model", None)),
    ],
)
def test_references_are_taken_apart(text: str, reference: BundleReference) -> None:
    assert parse_bundle_reference(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:model", "hf:a/b/c", "hf:a/b@", "hf:a/../b", "hf:../b", "hf:a/b@../x", "a/b", "hf:a/b@x y"],
)
def test_malformed_references_are_errors(text: str) -> None:
    with pytest.raises(InputError, match="expected hf:organisation/name@revision") as caught:
        parse_bundle_reference(text)
    assert repr(text) in str(caught.value)


def test_a_bundle_is_downloaded_once_and_opens(hub: LoopbackHub, tiny_bundle: Path) -> None:
    files = bundle_files(tiny_bundle)
    commit = hub.commit("maker/bundle", {**files, "README.md": b"x" * 50_000, "extra.onnx": b"no"}, "v1")
    said: list[str] = []
    directory = fetch_bundle("hf:maker/bundle@v1", say=said.append)
    assert said == [f"hf:maker/bundle@v1: commit {commit}"]
    assert bundle_files(directory) == files  # what the manifest does not name is not fetched
    Bundle.open(directory).check_files()
    with ZeroShotClassifier.open(f"hf:maker/bundle@{commit}") as classifier:
        assert len(classifier.bank) == 8


def test_a_downloaded_commit_needs_no_network(hub: LoopbackHub, tiny_bundle: Path) -> None:
    commit = hub.commit("maker/bundle", bundle_files(tiny_bundle))
    directory = fetch_bundle("hf:maker/bundle")
    asked = len(hub.requests)
    said: list[str] = []
    assert fetch_bundle(f"hf:maker/bundle@{commit}", say=said.append) == directory
    assert (len(hub.requests), said) == (asked, [])


def test_offline_the_last_known_commit_serves(
    hub: LoopbackHub, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("maker/bundle", bundle_files(tiny_bundle), "v1")
    directory = fetch_bundle("hf:maker/bundle@v1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert fetch_bundle("hf:maker/bundle@v1", say=said.append) == directory
    assert said == [f"hf:maker/bundle@v1: the hub cannot be reached, so the copy of commit {commit} is used"]
    with pytest.raises(InputError, match=r"'maker/bundle' at 'v2' was not downloaded.*cannot be reached"):
        fetch_bundle("hf:maker/bundle@v2")


def test_a_moved_branch_is_followed_and_the_old_copy_stays(hub: LoopbackHub, tiny_bundle: Path) -> None:
    files = bundle_files(tiny_bundle)
    old = hub.commit("maker/bundle", files)
    first = fetch_bundle("hf:maker/bundle")
    manifest = json.loads(files["manifest.json"])
    manifest["model"]["name"] = "newer"
    new = hub.commit("maker/bundle", {**files, "manifest.json": json.dumps(manifest).encode()})
    second = fetch_bundle("hf:maker/bundle")
    assert (first.name, second.name) == (old, new)
    assert Bundle.open(second).manifest.model.name == "newer"
    assert Bundle.open(first).manifest.model.name != "newer"


def test_a_damaged_file_of_a_bundle_is_an_error_and_nothing_opens(
    hub: LoopbackHub, tiny_bundle: Path
) -> None:
    files = bundle_files(tiny_bundle)
    name = next(name for name in files if name.endswith(".onnx"))
    commit = hub.commit("maker/bundle", {**files, name: files[name][:-1] + b"?"})
    with pytest.raises(InputError, match=f"'{name}' of 'maker/bundle'.*the manifest says"):
        fetch_bundle("hf:maker/bundle")
    hub.commit("maker/bundle", files)
    assert fetch_bundle("hf:maker/bundle").name != commit


def test_a_missing_file_and_a_missing_manifest_are_errors(hub: LoopbackHub, tiny_bundle: Path) -> None:
    files = bundle_files(tiny_bundle)
    name = next(name for name in files if name.endswith(".onnx"))
    hub.commit("maker/bundle", {key: data for key, data in files.items() if key != name})
    with pytest.raises(BundleError, match=f"the manifest names '{name}', which the repository does not have"):
        fetch_bundle("hf:maker/bundle")
    hub.commit("maker/weights", {"weights.bin": BIG})
    with pytest.raises(BundleError, match=r"hf:maker/weights: the repository has no manifest.json"):
        fetch_bundle("hf:maker/weights")


def test_a_manifest_cannot_name_files_outside(hub: LoopbackHub, tiny_bundle: Path) -> None:
    files = bundle_files(tiny_bundle)
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["../../outside"] = {"sha256": BIG_SHA256, "size_bytes": len(BIG)}
    hub.commit("maker/bundle", {"manifest.json": json.dumps(manifest).encode(), "../../outside": BIG})
    with pytest.raises(BundleError, match=r"\.\./\.\./outside"):
        fetch_bundle("hf:maker/bundle")
    assert hub.of("storage", "GET") == []


def test_an_interrupted_bundle_continues_with_what_is_missing(hub: LoopbackHub, tiny_bundle: Path) -> None:
    files = bundle_files(tiny_bundle)
    name = sorted(name for name in files if name.endswith(".onnx"))[-1]
    whole = dict(files)
    hub.commit("maker/bundle", files)
    files[name] = whole[name][:-1] + b"?"
    with pytest.raises(InputError, match="the manifest says"):
        fetch_bundle("hf:maker/bundle")
    files[name] = whole[name]
    hub.requests.clear()
    directory = fetch_bundle("hf:maker/bundle")
    assert bundle_files(directory) == whole
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"}
    assert len(fetched) < len(whole)


@pytest.mark.network
@pytest.mark.parametrize(
    "name", [name for name, entry in MODELS.items() if entry.weights and entry.weights.repo]
)
def test_the_table_names_files_that_the_hub_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    weights = MODELS[name].weights
    assert weights is not None
    assert weights.repo is not None
    found = HubClient.connect().find(weights.repo, weights.files, weights.revision)
    assert weights.sha256 in (None, found.sha256)


def test_weights_are_kept_in_the_host_cache() -> None:
    assert weights_directory("MobileCLIP-S0") == Path(
        os.environ["EDGECLIP_CACHE_DIR"], "models/MobileCLIP-S0"
    )
