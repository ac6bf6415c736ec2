"""``edgeclip models`` as a user meets it: whole outputs, files, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from edgeclip.cli import _run
from edgeclip.models.zoo import MODELS

Run = Callable[..., tuple[int, str, str]]
FREE, RESEARCH = "TinyCLIP-ViT-39M-16-Text-19M", "MobileCLIP-S0"
BIG = bytes(range(256)) * 1024
SHA256 = hashlib.sha256(BIG).hexdigest()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = _run([str(argument) for argument in arguments], debug=False)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with LoopbackHub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


# --- list --------------------------------------------------------------------------------------------------

TINYCLIP = """\
TinyCLIP: input 224, context 77, dim 512, preprocessing bicubic OpenAI, licence MIT, never run here
top-1: ImageNet-1k zero-shot top-1, from wkcn/TinyCLIP
  name                                              image    text  top-1
  TinyCLIP-ViT-8M-16-Text-3M                          8.3    15.2   41.1
  TinyCLIP-ViT-39M-16-Text-19M                       38.6    44.5   63.5
  TinyCLIP-ViT-40M-32-Text-19M                       39.7    44.5   59.8
  TinyCLIP-ViT-61M-32-Text-29M                       61.4    54.0   62.4
  TinyCLIP-auto-ViT-22M-32-Text-10M                pruned  pruned   53.7
  TinyCLIP-auto-ViT-45M-32-Text-18M.LAION400M      pruned  pruned   61.4
  TinyCLIP-auto-ViT-45M-32-Text-18M.LAIONYFCC400M  pruned  pruned   62.7
  TinyCLIP-auto-ViT-63M-32-Text-31M.LAION400M      pruned  pruned   63.9
  TinyCLIP-auto-ViT-63M-32-Text-31M.LAIONYFCC400M  pruned  pruned   64.5

image, text: millions of parameters before folding; pruned: the masks in the file decide.
preprocessing: interpolation, then the range of pixels, or OpenAI's mean and deviation.
Accuracies are the publishers' and were not measured here; run here: with the real weights.
"""

LITES = """\
EfficientNet-Lite: preprocessing bicubic (x-127)/128, licence Apache-2.0
top-1: ImageNet-1k top-1 of its own classifier, from TensorFlow TPU models
  name                image  text  input  run here  top-1
  EfficientNet-Lite0    4.7     -    224  yes        75.1
  EfficientNet-Lite1    5.4     -    240  no         76.7
  EfficientNet-Lite2    6.1     -    260  no         77.6
"""


def test_a_family_is_one_table_under_what_its_models_share(run: Run) -> None:
    assert run("models", "list", "--family", "tinyclip") == (0, TINYCLIP, "")
    code, out, err = run("models", "--family", "EfficientNet-Lite")
    assert (code, err) == (0, "")
    assert out.startswith(LITES)


def test_models_alone_lists_all_within_a_hundred_columns(run: Run) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    assert run("models", "list") == (0, out, "")
    assert max(map(len, out.splitlines())) <= 100
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "name" not in line]
    assert listed == list(MODELS)
    for line in (
        "MobileCLIP2: context 77, licence apple-amlr (research only), never run here",
        "  MobileCLIP2-S0     11.4   63.4    256  512  bilinear 0..1     71.5",
        "  ViT-L-14.laion2b_s32b_b82k      304.0  123.7  768  bicubic -1..1    75.3",
        "edgeclip: input 224, context 32, dim 512, preprocessing bilinear -1..1, no weights, never run here",
        "  nano-bag-192            1.9   2.1",
    ):
        assert line in out.splitlines()


def test_the_list_as_json_says_everything(run: Run) -> None:
    code, out, err = run("models", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == 1
    models = {model["name"]: model for model in document["models"]}
    assert list(models) == list(MODELS)
    assert models["MobileCLIP-S0"] == {
        "name": "MobileCLIP-S0",
        "family": "MobileCLIP",
        "tag": "datacompdr",
        "image_parameters": 11406464,
        "text_parameters": 42441216,
        "pruned_on_load": False,
        "image_size_px": [256, 256],
        "context_length": 77,
        "embed_dim": 512,
        "tokenizer": "clip-bpe",
        "preprocess": {
            "resize": "shortest",
            "interpolation": "bilinear",
            "crop": "center",
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
        },
        "licence": {
            "identifier": "apple-amlr",
            "name": "Apple Machine Learning Research Model License",
            "research_only": True,
            "url": "https://github.com/apple/ml-mobileclip/blob/main/LICENSE_MODELS",
        },
        "weights": {
            "repo": "apple/MobileCLIP-S0",
            "files": ["mobileclip_s0.pt"],
            "naming": "apple",
            "url": "https://huggingface.co/apple/MobileCLIP-S0",
            "revision": None,
            "sha256": None,
        },
        "accuracy": {
            "percent": 67.8,
            "metric": "ImageNet-1k zero-shot top-1",
            "source": "apple/ml-mobileclip, results/mobileclip_s0.jsonl",
        },
        "run_here": False,
        "note": "open_clip has no such text tower; only Apple's own file holds the whole model.",
    }
    assert {name for name, model in models.items() if model["run_here"]} == {"EfficientNet-Lite0"}


def test_an_unknown_family_is_an_error_that_lists_them(run: Run) -> None:
    code, out, err = run("models", "--family", "SigLIP")
    assert (code, out) == (1, "")
    assert err == (
        "edgeclip: error: no family is called 'SigLIP': there are MobileCLIP, MobileCLIP2, CLIP, TinyCLIP, "
        "EfficientNet-Lite, edgeclip.\n"
    )


def test_options_before_a_subcommand_are_a_syntax_error(run: Run) -> None:
    code, _, err = run("models", "--json", "show", RESEARCH)
    assert code == 2
    assert "give the options after 'show'" in err


def test_listing_needs_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys; from edgeclip.cli import _run; _run(sys.argv[1:], debug=False); "
        "print({'torch', 'numpy', 'huggingface_hub', 'onnxruntime'} & set(sys.modules), file=sys.stderr)"
    )
    for arguments in (["models"], ["models", "show", "MobileCLIP2-S0", "--json"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stderr == "set()\n", arguments


# --- show --------------------------------------------------------------------------------------------------

SHOWN = """\
name         MobileCLIP-B
family       MobileCLIP
image tower  vit, 86,348,544 parameters
text tower   transformer, 63,428,096 parameters
tokenizer    clip-bpe, context 77
embed dim    512
input        224×224
resize       shortest, bilinear, crop center
mean         0, 0, 0
std          1, 1, 1
licence      apple-amlr: Apple Machine Learning Research Model License, research only
weights      mobileclip_b.pt (apple names)
from         https://huggingface.co/apple/MobileCLIP-B
revision     not known beforehand; recorded at the first download
sha256       not known beforehand; the hub's is checked and recorded
accuracy     76.8 % ImageNet-1k zero-shot top-1 (apple/ml-mobileclip, results/mobileclip_b.jsonl)
run here     no: never run with the real weights
"""


def test_show_says_everything_about_one(run: Run) -> None:
    assert run("models", "show", "MobileCLIP-B") == (0, SHOWN, "")


def test_show_is_honest_about_pruning_backbones_and_missing_weights(run: Run) -> None:
    _, out, _ = run("models", "show", "TinyCLIP-auto-ViT-22M-32-Text-10M")
    assert "image tower  vit, decided by the masks in the file\n" in out
    _, out, _ = run("models", "show", "EfficientNet-Lite0")
    assert "text tower   none\n" in out
    assert "run here     yes\n" in out
    _, out, _ = run("models", "show", "nano-bag-192")
    assert "weights      none published\n" in out
    assert "accuracy" not in out


def test_show_as_json_has_the_whole_config(run: Run) -> None:
    code, out, _ = run("models", "show", RESEARCH, "--json")
    model = json.loads(out)["model"]
    assert code == 0
    assert model["image"]["kind"] == "fastvit"
    assert model["image"]["dims"] == [64, 128, 256, 512]
    assert model["text"]["conv_ends"] is True


def test_an_unknown_model_is_an_error_with_a_hint(run: Run) -> None:
    for command in ("show", "pull"):
        code, out, err = run("models", command, "MobilCLIP-S1")
        assert (code, out) == (1, "")
        assert err.startswith(
            "edgeclip: error: no model is called 'MobilCLIP-S1': did you mean MobileCLIP-S1"
        )


# --- pull --------------------------------------------------------------------------------------------------


def test_pull_downloads_and_prints_the_path(run: Run, hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.commit("wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", {"model.safetensors": BIG})
    code, out, err = run("models", "pull", FREE)
    path = Path(os.environ["EDGECLIP_CACHE_DIR"], "models", FREE, "model.safetensors")
    assert (code, out) == (0, f"{path}\n")
    assert err == (
        f"edgeclip: weights of {FREE}: licence MIT (MIT License)\n"
        f"edgeclip: downloaded: wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M at {commit}, 0.3 MB, "
        f"sha256 {SHA256}\n"
    )
    assert path.read_bytes() == BIG
    code, out, err = run("models", "pull", FREE)
    assert (code, out) == (0, f"{path}\n")
    assert "edgeclip: already here: " in err
    code, out, _ = run("models", "pull", FREE, "-o", tmp_path / "here")
    assert (code, out) == (0, f"{tmp_path}/here/model.safetensors\n")


def test_research_only_weights_need_a_word(run: Run, hub: LoopbackHub) -> None:
    hub.commit("apple/MobileCLIP-S0", {"mobileclip_s0.pt": BIG})
    code, out, err = run("models", "pull", RESEARCH)
    assert (code, out) == (1, "")
    assert err == (
        "edgeclip: weights of MobileCLIP-S0: licence apple-amlr (Apple Machine Learning Research Model "
        "License) https://github.com/apple/ml-mobileclip/blob/main/LICENSE_MODELS\n"
        "edgeclip: error: the weights of 'MobileCLIP-S0' may be used for research only (apple-amlr): read "
        "the licence, and say --accept-licence if you accept it.\n"
    )
    assert hub.requests == []
    code, out, _ = run("models", "pull", RESEARCH, "--accept-licence")
    assert code == 0
    receipt = json.loads(Path(f"{out.strip()}.receipt.json").read_bytes())
    assert (receipt["licence"], receipt["accepted"]) == ("apple-amlr", True)


def test_a_pinned_revision_is_asked_for_unless_another_is_said(run: Run, hub: LoopbackHub) -> None:
    name, repo = "TinyCLIP-ViT-8M-16-Text-3M", "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"
    commit = hub.commit(repo, {"model.safetensors": BIG})
    weights = MODELS[name].weights
    assert weights is not None
    code, _, err = run("models", "pull", name)
    assert code == 1
    assert f"{repo}' at '{weights.revision}' was not downloaded: the repository has no such revision" in err
    code, _, err = run("models", "pull", name, "--revision", "main")
    assert code == 0
    assert f"at {commit}" in err


def test_what_is_not_on_the_hub_is_said(run: Run) -> None:
    code, out, err = run("models", "pull", "nano-bag-256")
    assert (code, out) == (1, "")
    assert err == (
        "edgeclip: error: model 'nano-bag-256' has no published weights: it is an architecture to train.\n"
    )
    code, out, err = run("models", "pull", "TinyCLIP-auto-ViT-22M-32-Text-10M")
    assert (code, out) == (1, "")
    assert (
        "are not on the hub: download 'TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M.pt' from https://" in err
    )


def test_offline_is_one_sentence(run: Run, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, err = run("models", "pull", FREE)
    assert (code, out) == (1, "")
    assert err.splitlines()[1:] == [
        (
            "edgeclip: error: the repository 'wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M' was not downloaded: "
            "http://127.0.0.1:9 cannot be reached (Connection refused); check the network, or copy the "
            "file from another machine."
        )
    ]


def test_without_the_extra_pull_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, out, err = run("models", "pull", FREE)
    assert (code, out) == (1, "")
    assert 'run pip install "edgeclip[hub]"' in err


def test_ctrl_c_ends_with_130_and_the_next_pull_continues(hub: LoopbackHub, tmp_path: Path) -> None:
    huge = BIG * 96
    hub.commit("wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", {"model.safetensors": huge})
    hub.faults.hold, hub.faults.hold_after = threading.Event(), 15_000_000
    command = [sys.executable, "-m", "edgeclip", "models", "pull", FREE, "-o", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert hub.holding.wait(60)
    while not any(path.stat().st_size for path in tmp_path.glob(".*.part")):
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "edgeclip: interrupted"
    hub.faults.hold.set()
    hub.faults.hold = None
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == f"{tmp_path}/model.safetensors\n"
    assert Path(again.stdout.strip()).read_bytes() == huge
    assert hub.of("storage", "GET")[-1].byte_range is not None


# --- bundles from the hub ----------------------------------------------------------------------------------


def test_a_bundle_of_the_hub_is_taken_wherever_a_bundle_is_named(
    run: Run, hub: LoopbackHub, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        path.relative_to(tiny_bundle).as_posix(): path.read_bytes()
        for path in tiny_bundle.rglob("*")
        if path.is_file()
    }
    commit = hub.commit("maker/tiny", files, "v1")
    named = f"edgeclip: hf:maker/tiny@v1: commit {commit}\n"
    code, out, err = run("bundle", "inspect", "hf:maker/tiny@v1")
    assert (code, err) == (0, named)
    assert "tiny-colours" in out
    reference = f"hf:maker/tiny@{commit}"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # from here on only the copy serves
    assert run("verify", reference)[0] == 0
    assert run("bundle", "pack", reference, "-o", tmp_path / "tiny.tar")[0] == 0
    assert run("bundle", "diff", reference, tiny_bundle, "--exit-code")[0] == 0
    assert run("labels", "build", "--bundle", reference, "--labels", "red,green")[0] == 0
    photo = next(iter(sorted((Path(__file__).parents[2] / "edgeclip/assets/photos").glob("*.jpg"))))
    code, out, err = run("classify", photo, "--bundle", reference, "--jsonl")
    assert code == 0, err
    assert json.loads(out.splitlines()[0])["schema"] == 1
    code, out, err = run("bundle", "inspect", "hf:maker")
    assert (code, out) == (1, "")
    assert "expected hf:organisation/name@revision" in err
