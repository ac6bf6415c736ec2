"""The build of the default model: its recipe, its stages, what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from edgeclip.bundle import Bundle, BundleWriter  # noqa: E402
from edgeclip.distill.optim import parameter_groups  # noqa: E402
from edgeclip.distill.recipe import FeatureLoss, InfoNCELoss, PictureMatchLoss  # noqa: E402
from edgeclip.errors import BundleError, ConfigError, ExportError, InputError  # noqa: E402
from edgeclip.export.recipes.build_default import (  # noqa: E402
    Build,
    _fit,
    _notice,
    _recipe,
    _size,
    build,
    main,
)
from edgeclip.export.recipes.command import (  # noqa: E402
    asked_to_stop,
    check_out,
    put_bundle,
    run_build,
)
from edgeclip.export.recipes.default_data import materials_of, parents_of  # noqa: E402
from edgeclip.export.verify import verify_bundle  # noqa: E402
from edgeclip.fetch import data_directory, materials  # noqa: E402
from edgeclip.labels import LabelBank  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info  # noqa: E402
from edgeclip.preprocess import Preprocess  # noqa: E402
from edgeclip.runtime.parity import golden_check  # noqa: E402
from edgeclip.runtime.session import open_session  # noqa: E402
from edgeclip.tensors import map_tensors, write_tensors  # noqa: E402

CHECKPOINT = Path(__file__).parents[1] / "data" / "default-checkpoint"


def _plan(tmp_path: Path, **said: object) -> Build:
    return Build(work=tmp_path / "work", out=tmp_path / "bundle", **said)  # type: ignore[arg-type]


def test_its_stages_are_distillation_then_alignment(tmp_path: Path) -> None:
    recipe, _ = _recipe(_plan(tmp_path))
    targets, alignment = recipe.stage
    assert [type(spec) for spec in targets.loss] == [FeatureLoss, PictureMatchLoss]
    assert [type(spec) for spec in alignment.loss] == [FeatureLoss, PictureMatchLoss, InfoNCELoss]
    assert (recipe.name, recipe.licence, recipe.dtype) == ("edgeclip-default", "Apache-2.0", "float16")
    assert [entry.data for entry in recipe.validation] == ["tune_en", "tune_zh"]


@pytest.mark.parametrize("stage", [0, 1])
def test_the_image_tower_and_the_scale_stand_still(stage: int, tmp_path: Path) -> None:
    recipe, _ = _recipe(_plan(tmp_path))
    with torch.device("meta"):
        from edgeclip.models.clip import build_clip

        model = build_clip(read_checkpoint_info(CHECKPOINT).config)
    moving = {name for group in parameter_groups(model, recipe.stage[stage]) for name in group.names}
    assert moving == {name for name, _ in model.text_tower.named_parameters(prefix="text_tower")}


def test_steps_are_shared_by_the_stages(tmp_path: Path) -> None:
    recipe, record = _recipe(_plan(tmp_path, steps=1000))
    assert [stage.steps for stage in recipe.stage] == [900, 100]
    assert [stage.schedule.warmup for stage in recipe.stage] == [18, 2]
    assert "# --set stage.0.samples=921600" in record
    with pytest.raises(ConfigError, match="--steps is 2, expected at least 4"):
        _recipe(_plan(tmp_path, steps=2))


def test_default_zh_is_another_model_under_another_licence(tmp_path: Path) -> None:
    recipe, _ = _recipe(_plan(tmp_path, cedict=True))
    assert (recipe.name, recipe.licence) == ("edgeclip-default-zh", "CC-BY-SA-4.0")
    assert {teacher.licence for teacher in recipe.teacher} == {"CC-BY-SA-4.0"}  # type: ignore[union-attr]


def test_materials_elsewhere_are_found_by_training_too(tmp_path: Path) -> None:
    recipe, _ = _recipe(_plan(tmp_path, data=tmp_path / "there"))
    assert recipe.student.materials == str(tmp_path / "there")


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    check_out(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    check_out(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match=r"mine' is there and no bundle"):
        check_out(tmp_path / "mine")


def test_errors_end_with_their_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--materials", str(tmp_path / "none"), "--work", str(tmp_path / "w"), "-o", str(tmp_path / "b")]
    assert main(words) != 0
    assert "set 'default-model' is not complete" in caplog.text


def test_threads_are_at_least_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path), "-o", str(tmp_path / "b"), "--threads", "0"])
    assert "argument --threads: got '0', expected a whole number, 1 or more." in capsys.readouterr().err


def test_the_checkpoint_that_a_build_writes_is_not_its_source(tmp_path: Path) -> None:
    (tmp_path / "w" / "checkpoint").mkdir(parents=True)
    mine = tmp_path / "w" / "checkpoint" / "config.json"
    mine.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--checkpoint is '.*checkpoint', which this build writes itself"):
        build(Build(work=tmp_path / "w", out=tmp_path / "b", checkpoint=tmp_path / "w" / "checkpoint"))
    assert mine.read_text("utf-8") == "{}"


def test_a_build_that_was_asked_to_stop_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def stopped() -> None:
        with asked_to_stop() as asked:
            signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        raise KeyboardInterrupt

    assert run_build(logging.getLogger("some build"), stopped) == 130
    assert "interrupted; the same command goes on" in caplog.text
    assert run_build(logging.getLogger("some build"), lambda: None) == 0


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A copy of the embedded bundle, whose golden file holds eight photographs."""
    embedded = Bundle.open("default")
    with BundleWriter(tmp_path / "copy", manifest={}) as writer:
        for name in embedded.manifest.files:
            writer.add(name, embedded.file(name), exact=True)
        copied = writer.commit_copy(embedded.manifest_bytes)
    assert copied.manifest.golden is not None
    tensors, metadata = map_tensors(copied.file(copied.manifest.golden), where="golden")
    photographs = sorted(Path(__file__).parents[2].glob("edgeclip/assets/photos/*.jpg"))[:8]
    images = np.stack([Preprocess(copied.manifest.preprocess)(path) for path in photographs])
    with open_session(copied.variant("onnx-int8").tower("image")) as session:
        embeddings = session.run({"image": images})["image_embedding"]
    bank = LabelBank.open(copied.file(copied.manifest.label_banks["imagenet-1k"].file))
    best = np.argsort(-embeddings @ bank.embeddings.T, axis=1)[:, :5].astype(np.int32)
    more = {**tensors, "images": images, "image_embedding": embeddings, "bank_top5": best}
    with BundleWriter(copied.path) as writer:
        writer.manifest["golden"] = writer.add("golden.safetensors", write_tensors(more, metadata))
        return writer.commit()


def test_golden_pictures_give_way_to_the_limit(bundle: Bundle, tmp_path: Path) -> None:
    limit = (_size(bundle) - 500_000) / 1e6
    smaller = _fit(_plan(tmp_path, largest_mb=limit), bundle)
    assert _size(smaller) <= 1e6 * limit
    assert smaller.manifest.golden is not None
    tensors, _ = map_tensors(smaller.file(smaller.manifest.golden), where="golden")
    assert len(tensors["images"]) == len(tensors["image_embedding"]) == len(tensors["bank_top5"]) == 4
    assert golden_check(smaller, "onnx-int8").passed


def test_a_bundle_that_fits_stays_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    assert _fit(_plan(tmp_path, largest_mb=100.0), bundle).digest == bundle.digest
    assert _fit(_plan(tmp_path, largest_mb=0.0), bundle).digest == bundle.digest


def test_a_bundle_that_cannot_fit_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"above the limit of 5 MB"):
        _fit(_plan(tmp_path, largest_mb=5.0), bundle)


def test_the_bundle_in_its_place_is_the_same_and_nothing_else_is_there(
    bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    put_bundle(bundle, out)
    with BundleWriter(out) as writer:
        writer.manifest["model"]["notices"] = [writer.add("OLD.txt", b"of the bundle before")]
        writer.commit()
    placed = put_bundle(bundle, out)
    assert placed.digest == bundle.digest
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".")} == {*bundle.manifest.files, "manifest.json"}


DATA = data_directory()  # tests have a cache of their own


def _fetched() -> bool:
    try:
        return all(materials(name, DATA) for name in ("default-model", "photos", "stamps"))
    except InputError:
        return False


needs_materials = pytest.mark.skipif(not _fetched(), reason="edgeclip data fetch default-model photos stamps")


@pytest.mark.parametrize("cedict", [False, True])
def test_the_notice_names_every_parent(cedict: bool, tmp_path: Path) -> None:
    plan = _plan(tmp_path, cedict=cedict)
    shutil.copytree(CHECKPOINT, plan.work / "checkpoint")
    terms = tmp_path / "usr" / "share" / "doc" / "wordnet-base" / "copyright"
    terms.parent.mkdir(parents=True)
    terms.write_text("terms of WordNet", encoding="utf-8")
    text = _notice(plan, {"wordnet-base": tmp_path}).decode("utf-8")
    assert all(parent["name"] in text for parent in parents_of(cedict=cedict))
    assert "terms of WordNet" in text
    assert ("creativecommons.org/licenses/by-sa/4.0" in text) is cedict


@pytest.mark.full
@needs_materials
def test_a_checkpoint_becomes_a_verified_bundle(tmp_path: Path) -> None:
    plan = _plan(tmp_path, checkpoint=CHECKPOINT, data=DATA)
    made = build(plan)
    assert made is not None
    assert _size(made) <= 14_000_000
    assert {verdict.status for verdict in verify_bundle(made).variants} == {"passed"}
    variant = made.manifest.variants["onnx-int8"]
    assert variant.session_config == {}, "its bytes are exact on every processor"
    assert variant.accuracy is not None
    assert variant.accuracy["en"]["n"] == 130
    assert variant.accuracy["en"]["top1"] > 0.5
    assert set(made.manifest.label_banks) == {"imagenet-1k", "imagenet-1k-zh"}
    assert made.manifest.model.scale == pytest.approx(13.4, abs=0.5)
    known = load_checkpoint(CHECKPOINT, external=materials_of(DATA, cedict=False)).state_dict()
    written = load_checkpoint(
        plan.work / "checkpoint", external=materials_of(DATA, cedict=False)
    ).state_dict()
    assert all(torch.equal(written[key], known[key]) for key in known if key != "logit_scale")
    said = json.loads((plan.work / "checkpoint" / "training.json").read_text("utf-8"))
    assert said["texts"] == 111_899
    assert np.isfinite(made.manifest.model.scale)
