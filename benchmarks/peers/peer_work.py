"""Make what the peers are compared on, once: photographs, weights, exports, bundles, packages of their own.

Everything lies in one work folder and is made only where it is missing, so that measuring can be repeated.
The weights are one file a model (full size, random, perturbed) in the names its own library reads; every
peer and our exporter start from it. Peers whose requirements contradict ours get folders of their own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
S0, VIT = "MobileCLIP2-S0", "ViT-B-32.openai"
TEMPLATE = "a photo of a {}."
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# Folder: what pip installs there. Without their requirements where those would replace torch or onnxruntime.
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx_clip": ("onnx-clip",),
    "modern": ("--no-deps", "modern-onnx-clip", "requests", "urllib3", "charset-normalizer", "certifi"),
    "optimum": (
        "--no-deps",
        "optimum-onnx",
        "optimum~=2.1.0",
        "transformers<4.58",
        "huggingface_hub<1",
        "tokenizers<0.23",
        "requests",
        "urllib3",
        "charset-normalizer",
        "certifi",
    ),
}
# Peers that were looked at and are not run, and why.
LEFT_OUT = {
    "clip.cpp (clip-cpp 0.5.0)": "reads GGUF files only, its wheel holds no converter and no weights",
    "faster-clip 0.4.0": "downloads its own int8 weights at run time and takes no others",
}


@dataclass(frozen=True)
class Work:
    """The work folder, and what lies where in it."""

    folder: Path

    @property
    def large(self) -> list[Path]:
        """12-megapixel JPEG files as from a camera."""
        return sorted((self.folder / "photos").glob("large-*.jpg"))

    @property
    def small(self) -> list[Path]:
        """JPEG files of at most 0.3 megapixels."""
        return sorted((self.folder / "photos").glob("small-*.jpg"))

    @property
    def middle(self) -> Path:
        """A 2-megapixel JPEG file."""
        return self.folder / "photos" / "middle.jpg"

    def at(self, *parts: str) -> str:
        """Return a path in it, as text."""
        return str(self.folder.joinpath(*parts))

    def has(self, *parts: str) -> bool:
        """Return whether it is there."""
        return self.folder.joinpath(*parts).exists()

    @property
    def labels(self) -> list[str]:
        """The hundred labels, as the bundles offer them."""
        labels: list[str] = json.loads(Path(self.at("labels.json")).read_text(encoding="utf-8"))
        return labels


def prepare(work: Work, variants: Sequence[str], *, vit: bool, say: Callable[[str], None]) -> dict[str, str]:
    """Make whatever is missing.

    Args:
        work: where.
        variants: of our bundles.
        vit: whether ViT-B/32 and the peers that know nothing else are wanted.
        say: told what is being made.

    Returns:
        Peers that could not be prepared, and why.
    """
    work.folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    steps: list[tuple[str, Callable[[], None], tuple[str, ...]]] = [
        ("our package, installed", lambda: _installed(work), ()),
        ("photographs", lambda: _photos(work), ("photos",)),
        ("weights of MobileCLIP2-S0", lambda: _s0_weights(work), ("s0.safetensors",)),
        ("labels", lambda: _labels(work), ("labels.json",)),
        ("open_clip's export", lambda: _s0_exports(work), ("s0-onnx", "done")),
        ("our bundle of MobileCLIP2-S0", lambda: _bundle(work, "s0", S0, variants), ()),
        ("whether the probe passes with the same settings", lambda: _floor(work, variants), ("floor.json",)),
    ]
    for what, make, marker in steps:
        if not marker or not work.has(*marker):
            say(what)
            make()
    if not vit:
        return failed
    optional: list[tuple[str, Callable[[], None], tuple[str, ...]]] = [
        ("weights of ViT-B/32", lambda: _vit_weights(work), ("vit", "done")),
        ("our bundle of ViT-B/32", lambda: _bundle(work, "vit/model", VIT, _plain(variants)), ()),
        ("transformers' export of ViT-B/32", lambda: _vit_exports(work), ("vit-onnx", "done")),
        ("onnx_clip", lambda: _onnx_clip(work), ("site-onnx_clip", "done")),
        ("modern-onnx-clip", lambda: _modern(work), ("modern-model", "done")),
        ("optimum", lambda: _optimum(work), ("vit-optimum", "done")),
    ]
    for what, make, marker in optional:
        if marker and work.has(*marker):
            continue
        say(what)
        try:
            make()
        except Exception as error:  # a peer that cannot be had is reported, and the others go on
            failed[what] = str(getattr(error, "stderr", "") or error).strip()[-300:]
            say(f"{what}: {failed[what]}")
    return failed


def _plain(variants: Sequence[str]) -> list[str]:
    return [name for name in variants if "@" not in name and name != "openvino-fp32"]


def _installed(work: Work) -> None:
    """Install our package as users do, so that its processes find byte code as those of the peers do."""
    target = work.folder / "site-edgeclip"
    shutil.rmtree(target, ignore_errors=True)
    asked = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *asked], check=True)


# --- pictures -----------------------------------------------------------------------------------------------


def _photos(work: Work) -> None:
    """Cut photographs that `edgeclip data fetch photos` brought, or enlarge ours where it brought none."""
    from edgeclip.fetch import photos

    found = sorted(photos(), key=lambda photo: -min(photo.entry.size_px[0] / 4, photo.entry.size_px[1] / 3))
    paths = [photo.path for photo in found] or sorted((ROOT / "edgeclip/assets/photos").glob("*.jpg"))
    (work.folder / "photos").mkdir(exist_ok=True)
    for number, path in enumerate(paths[:2]):
        _cut(path, (4000, 3000)).save(work.at("photos", f"large-{number}.jpg"), quality=90, subsampling=2)
    _cut(paths[0], (1632, 1224)).save(work.at("photos", "middle.jpg"), quality=90, subsampling=2)
    for number, path in enumerate(paths[:8]):
        _cut(path, (600, 450)).save(work.at("photos", f"small-{number}.jpg"), quality=90, subsampling=2)


def _cut(path: Path, size: tuple[int, int]) -> Image.Image:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = min(picture.width / size[0], picture.height / size[1])
    return picture.crop((0, 0, round(scale * size[0]), round(scale * size[1]))).resize(size)


# --- MobileCLIP2-S0 -----------------------------------------------------------------------------------------


def _s0_weights(work: Work) -> None:
    from safetensors.torch import save_file

    model = _exported_towers().fresh(S0)
    with warnings.catch_warnings():
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, work.at("s0.safetensors"))


def _exported_towers() -> Any:
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "tools"), str(Path(__file__).parent)]
    import exported_towers

    return exported_towers


def _bundle(work: Work, stem: str, model: str, variants: Sequence[str]) -> None:
    """Let our own exporter make what is missing of a bundle."""
    from edgeclip.bundle import Bundle

    target = Path(work.at(f"bundle-{stem.partition('/')[0]}"))
    there = set(Bundle.open(target).manifest.variants) if (target / "manifest.json").is_file() else set()
    missing = [name for name in variants if name not in there]
    if missing:
        asked = [word for name in missing for word in ("--variant", name)]
        command = ["export", work.at(f"{stem}.safetensors"), "--model", model, *asked, "-o", str(target)]
        _edgeclip(*command)


def _edgeclip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "edgeclip", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )


def _labels(work: Work) -> None:
    """Write down the hundred names that an export offers where nothing else is said."""
    from edgeclip.export.reference import everyday

    names = list(everyday(("en",)).labels.names)
    Path(work.at("labels.json")).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def _s0_exports(work: Work) -> None:
    """Export both folded towers as PyTorch's documentation says, and encode the labels with open_clip."""
    peers = _exported_towers()
    import open_clip
    import torch
    from timm.utils import reparameterize_model

    folder = work.folder / "s0-onnx"
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(S0, pretrained=work.at("s0.safetensors")).eval()
    (folder / "image.onnx").write_bytes(peers.theirs(model, (256, 256)))
    tokenizer = open_clip.get_tokenizer(S0)
    folded = reparameterize_model(copy.deepcopy(model)).eval()
    _export(
        _TextTower(folded),
        tokenizer(["a cat", "two dogs"]),
        ("tokens", "text_embedding"),
        folder / "text.onnx",
    )
    prompts = [TEMPLATE.format(label) for label in work.labels]
    with torch.inference_mode():
        bank = folded.encode_text(tokenizer(prompts), normalize=True).numpy()
    np.save(folder / "bank.npy", bank)
    _tokenizer(folder)
    (folder / "done").touch()


def _export(tower: Any, example: Any, names: tuple[str, str], path: Path) -> None:
    import torch

    with _quiet():
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            opset_version=20,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            verbose=False,
        )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def _TextTower(model: Any) -> Any:  # noqa: N802 - a class, once torch is there
    from torch import nn

    class TextTower(nn.Module):
        """Texts to unit embeddings."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any) -> Any:
            return self.model.encode_text(tokens, normalize=True)

    return TextTower().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer twice: as transformers reads it, and in one file that pads as open_clip does."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    theirs = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {49406: start, 49407: end}
    vocabulary = {names.get(number, text): number for text, number in theirs.encoder.items()}
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ends = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    made = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 49406), (end, 49407)]
    )
    made.enable_padding(length=77, pad_id=0, pad_token="!")  # noqa: S106 - what open_clip pads with
    made.enable_truncation(77)
    (folder / "padded.json").write_text(made.to_str(), encoding="utf-8")
    sample = ["a photo of a cat.", "Two dogs, 3 cars & a café!"]
    if [row.ids for row in made.encode_batch(sample)] != theirs(sample).tolist():
        raise SystemExit("the two tokenizers give different rows")


def _floor(work: Work, variants: Sequence[str]) -> None:
    """Write down whether the trained MobileCLIP probe passes its limits with the settings of the variants.

    It was trained on pictures of shapes: ranges are chosen on some that it was trained with, and it is judged
    on combinations that it never saw, offered the names of all of them.
    """
    from edgeclip.shapes import held_out_combinations, label

    shapes, names = work.folder / "shapes", work.folder / "shapes.txt"
    _edgeclip("data", "make-shapes", "-o", str(shapes), "--train", "512", "--held-out", "1000")
    offered = sorted({label(each, "en") for each in held_out_combinations()})
    names.write_text("\n".join(offered) + "\n", encoding="utf-8")
    found: dict[str, Any] = {}
    for name in variants:
        asked = ["--calibration-data", str(shapes / "images/train"), "--labels", str(names)]
        asked += ["--reference", str(shapes / "images/held_out"), "--variant", name]
        target = str(work.folder / "probe" / name)
        done = _edgeclip("export", str(ROOT / "tests/data/probes/mobileclip"), *asked, "-o", target, "--json")
        passed = done.returncode == 0
        found[name] = {"passed": passed, "labels": len(offered)}
        if passed:
            found[name]["towers"] = json.loads(done.stdout)["variants"][name]["towers"]
        else:
            said = done.stderr.strip().splitlines()[-1].partition(". Nothing was written")[0]
            found[name]["said"] = said.replace(f"{work.folder}/", "")
    Path(work.at("floor.json")).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _edgeclip(*asked: str) -> subprocess.CompletedProcess[str]:
    """Run a command of edgeclip; what it makes of the request is in the result."""
    command = [sys.executable, "-m", "edgeclip", *asked]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


# --- ViT-B/32 -----------------------------------------------------------------------------------------------


def _vit_weights(work: Work) -> None:
    """Save transformers' CLIP ViT-B/32 with random weights, processors and the embeddings of the labels."""
    import tokenizers
    import torch
    import torchvision_shim  # noqa: F401
    import transformers

    folder = work.folder / "vit"
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=512)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)
    _tokenizer(folder)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    prompts = [TEMPLATE.format(label) for label in work.labels]
    padded = tokenizers.Tokenizer.from_file(str(folder / "padded.json")).encode_batch(prompts)
    rows = torch.tensor([row.ids for row in padded])
    with torch.inference_mode():
        found = model.get_text_features(input_ids=rows)
        features = getattr(found, "pooler_output", found)
        np.save(folder / "bank.npy", torch.nn.functional.normalize(features, dim=-1).numpy())
    (folder / "done").touch()


def _vit_exports(work: Work) -> None:
    """Export the two towers, for the plain loop and for the packages that bring no weights here."""
    import torch
    import torchvision_shim  # noqa: F401
    import transformers
    from torch import nn

    model = transformers.CLIPModel.from_pretrained(work.at("vit"), attn_implementation="sdpa").eval()

    class Tower(nn.Module):
        """Pictures, or texts, to embeddings."""

        def __init__(self, kind: str) -> None:
            super().__init__()
            self.model, self.kind = model, kind

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            if self.kind == "image":
                found = self.model.get_image_features(pixel_values=given)
            else:
                found = self.model.get_text_features(input_ids=given)
            features: torch.Tensor = getattr(found, "pooler_output", found)
            return nn.functional.normalize(features, dim=-1)

    folder = work.folder / "vit-onnx"
    folder.mkdir(exist_ok=True)
    _export(
        Tower("image").eval(), torch.rand(2, 3, 224, 224), ("IMAGE", "image_embedding"), folder / "image.onnx"
    )
    tokens = torch.full((2, 77), 49407)
    tokens[:, 0] = 49406
    _export(Tower("text").eval(), tokens, ("TEXT", "text_embedding"), folder / "text.onnx")
    (folder / "done").touch()


def _install(work: Work, name: str) -> str:
    target = work.at(f"site-{name}")
    if not os.path.isdir(target):  # noqa: PTH112
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--target", target, *PACKAGES[name]], check=True, capture_output=True, text=True
        )
    return target


def _onnx_clip(work: Work) -> None:
    """Put our files where it would have downloaded its own."""
    target = Path(_install(work, "onnx_clip"))
    for kind in ("image", "text"):
        link = target / "onnx_clip" / "data" / f"clip_{kind}_model_vitb32.onnx"
        link.unlink(missing_ok=True)
        link.symlink_to(work.folder.resolve() / "vit-onnx" / f"{kind}.onnx")
    (target / "done").touch()


def _modern(work: Work) -> None:
    """Lay the folder that its converter writes: it wants open_clip beside it, so the files are ours."""
    _install(work, "modern")
    folder = work.folder / "modern-model"
    folder.mkdir(exist_ok=True)
    for kind, name in (("image", "visual"), ("text", "textual")):
        (folder / f"{name}.onnx").unlink(missing_ok=True)
        (folder / f"{name}.onnx").symlink_to(work.folder.resolve() / "vit-onnx" / f"{kind}.onnx")
    (folder / "config.json").write_text('{"image_size": 224, "context_length": 77}', encoding="utf-8")
    found = importlib.util.find_spec("open_clip")
    assert found is not None
    assert found.origin is not None
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"  # which it would download
    shutil.copyfile(Path(found.origin).with_name(vocabulary), folder / vocabulary)
    (folder / "done").touch()


def _optimum(work: Work) -> None:
    """Let optimum export the model in its own environment."""
    target = _install(work, "optimum")
    program = (
        "import torchvision_shim\n"
        "from optimum.onnxruntime import ORTModelForZeroShotImageClassification as Model\n"
        "from transformers import AutoImageProcessor, AutoTokenizer\n"
        f"source, target = {work.at('vit')!r}, {work.at('vit-optimum')!r}\n"
        "Model.from_pretrained(source, export=True).save_pretrained(target)\n"
        "AutoImageProcessor.from_pretrained(source, use_fast=True).save_pretrained(target)\n"
        "AutoTokenizer.from_pretrained(source).save_pretrained(target)\n"
    )
    path = os.pathsep.join([target, str(ROOT / "tests" / "tools")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    Path(work.at("vit-optimum", "done")).touch()
