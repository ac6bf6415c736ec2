"""Weights files from strangers: what can be read is read, the rest is one sentence, and nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle  # noqa: TID251 - the attacks are pickles
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import save, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgeclip.errors import InputError  # noqa: E402
from edgeclip.models import state_files  # noqa: E402
from edgeclip.models.state_files import read_state, write_state  # noqa: E402


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.half": torch.randn(5, generator=generator).half(),
        "a.count": torch.tensor(7),
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items()
    )


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "w"])
def test_safetensors_are_known_by_content(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    save_file(state, tmp_path / name)
    assert same(read_state(tmp_path / name), state)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
def test_torch_files_are_known_by_content(state: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    torch.save(state, tmp_path / name)
    assert same(read_state(tmp_path / name), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "name": "run"},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: OrderedDict(state),
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1e-4)},
        lambda state: {key: nn.Parameter(value, requires_grad=False) for key, value in state.items()},
    ],
)
def test_wrapping_of_training_comes_off(
    state: dict[str, Tensor], tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]
) -> None:
    torch.save(wrap(state), tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


def test_module_stays_where_not_every_name_has_it(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "w.pt")
    assert set(read_state(tmp_path / "w.pt")) == {"module.a", "b"}


def test_tied_weights_are_read(tmp_path: Path) -> None:
    table = torch.randn(8, 8)
    torch.save({"a": table, "b": table}, tmp_path / "w.pt")
    assert torch.equal(read_state(tmp_path / "w.pt")["b"], table)


# --- what is refused ---------------------------------------------------------------------------------------


class Payload:
    """Would create a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Stranger:
    """A class of somebody's project."""


def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"weight": torch.zeros(2), "extra": Payload(marker)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"asks for '(posix|nt)\.system' when it is opened.*nothing was run"):
        read_state(tmp_path / "w.pt")
    assert not marker.exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"weight": Payload(marker)}))
    with pytest.raises(InputError, match=r"is a bare pickle, the format of torch before 1\.6"):
        read_state(tmp_path / "w.pt")
    assert not marker.exists()


def test_code_in_an_old_torch_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"w": Payload(marker)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="is a bare pickle"):
        read_state(tmp_path / "w.pt")
    assert not marker.exists()


def test_code_hidden_in_a_handmade_archive_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"w": Payload(marker)}))
        archive.writestr("w/version", "3\n")
        archive.writestr("w/byteorder", "little")
    with pytest.raises(InputError, match="weights file"):
        read_state(tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [Stranger(), {"model": nn.Linear(2, 2)}, {"w": torch.zeros(2), "f": print}]
)
def test_objects_other_than_tensors_are_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"asks for '[\w.]*(Stranger|Linear|print)'"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds an empty mapping, expected names and tensors"),
        ([torch.zeros(2)], "holds list, expected names and tensors"),
        (torch.zeros(2), "holds Tensor, expected"),
        ({"a": torch.zeros(2), "b": 3}, r"holds 1 entries that are no plain tensors.*'b' \(int\)"),
        ({3: torch.zeros(2)}, r"no plain tensors, expected none: 3 \(Tensor\)"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"'a' \(Tensor\)"),
        ({"a": torch.eye(2).to_sparse()}, r"'a' \(Tensor\)"),
    ],
)
def test_what_is_no_state_dict_is_described(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "w.pt")


def test_torchscript_names_the_files_to_use_instead(tmp_path: Path) -> None:
    # The shape of such an archive is what counts; torch.jit itself warns that it is deprecated.
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version", "code/__torch__/model.py"):
            archive.writestr(f"model/{name}", b"x")
    with pytest.raises(InputError, match=r"is a TorchScript archive.*timm/vit_base_patch32_clip_224\.openai"):
        read_state(tmp_path / "ViT-B-32.pt")


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * (1 << 20))
    with pytest.raises(
        InputError, match=r"unpacks to 1048576 bytes from \d+, with 1 compressed members of 1"
    ):
        read_state(tmp_path / "w.pt")


def test_members_that_lie_over_each_other_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\0" * 4096)
        # Many names for one stretch of the file: a bomb without compression.
        first = archive.infolist()[0]
        for index in range(8):
            copied = zipfile.ZipInfo(f"w/data/{index}")
            for attribute in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copied, attribute, getattr(first, attribute))
            archive.filelist.append(copied)
            archive.NameToInfo[copied.filename] = copied
    with pytest.raises(InputError, match="unpacks to 36864 bytes from"):
        read_state(path)


def test_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"its tensors claim 4398046511104 bytes, but the file has \d{3,4}"):
        read_state(tmp_path / "w.pt")


def test_huge_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "_MAX_PICKLE_BYTES", 100)
    torch.save({f"key{index}": torch.zeros(1) for index in range(50)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"its data\.pkl has \d+ bytes, expected at most 100"):
        read_state(tmp_path / "w.pt")


def test_archive_with_two_pickles_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        archive.writestr("b/data.pkl", b"x")
    with pytest.raises(InputError, match=r"is a zip archive with 2 data\.pkl, expected one"):
        read_state(tmp_path / "w.pt")


def test_plain_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", b"x")
    with pytest.raises(InputError, match=r"is a zip archive with 0 data\.pkl"):
        read_state(tmp_path / "w.pt")


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "w.pt").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate((16 << 30) + 1)  # sparse: takes no room
    with pytest.raises(InputError, match="has 17179869185 bytes, expected at most 17179869184"):
        read_state(tmp_path / "w.pt")


def test_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with tarfile.open(tmp_path / "w.pt", "w") as archive:
        archive.add(tmp_path / "x", "storages")
    with pytest.raises(InputError, match=r"is a tar archive, the format of torch before 0\.4"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "is a text file, perhaps an error page"),
        (b'{"error": "not found"}', "is a text file"),
        (b"GGUF\x03\0\0\0 and more", r"begins with b'GGUF\\x03\\x00\\x00\\x00', which is no weights file"),
        (b"\x00" * 100, "which is no weights file"),
        (b"PK\x05\x06" + b"\0" * 18, r"zip archive with 0 data\.pkl"),
        (b"PK\x03\x04 and nothing", "is no whole archive"),
        (b"\xff" * 8 + b"{}", "which is no weights file"),
        (b"\x02" + b"\0" * 7 + b"{}", "holds an empty mapping"),
        (b"\x09" + b"\0" * 7 + b'{"a": 3 }', "is no whole safetensors file"),
    ],
)
def test_other_content_is_described(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "w.pt")


def test_folder_names_the_files_in_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; it holds no weights file"):
        read_state(tmp_path)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"is a folder; name the file in it, one of \['open_clip_model"):
        read_state(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.pt' cannot be read \(No such file or directory\)"):
        read_state(tmp_path / "nothing.pt")


def test_safetensors_that_point_outside_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(InputError, match="is no whole safetensors file"):
        read_state(tmp_path / "w.safetensors")


def _files() -> dict[str, bytes]:
    tensors = {"a.weight": torch.arange(60.0).reshape(3, 20), "b": torch.ones(4, dtype=torch.float16)}
    stream = io.BytesIO()
    torch.save({"state_dict": tensors}, stream)
    return {"torch": stream.getvalue(), "safetensors": save(tensors)}


FILES = _files()


@pytest.mark.parametrize("kind", sorted(FILES))
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_a_typed_error_or_still_tensors(
    kind: str, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(content))
    with contextlib.suppress(InputError):
        assert all(isinstance(value, Tensor) for value in read_state(path).values())


@pytest.mark.parametrize("kind", sorted(FILES))
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_truncation_is_a_typed_error(kind: str, share: float, tmp_path: Path) -> None:
    content = FILES[kind]
    (tmp_path / "w.bin").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="weights file"):
        read_state(tmp_path / "w.bin")


def test_the_file_may_go_after_reading_a_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A mapped file is a view: whoever keeps the tensors copies them, as foreign.py does."""
    torch.save(state, tmp_path / "w.pt")
    copies = {key: value.clone() for key, value in read_state(tmp_path / "w.pt").items()}
    shutil.rmtree(tmp_path)
    assert same(copies, state)


def test_written_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_state(tmp_path / "weights.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "weights.safetensors").stat().st_mode == plain.stat().st_mode
    assert torch.equal(read_state(tmp_path / "weights.safetensors")["x"], torch.zeros(2))
