"""The facade: what it takes, what it answers, when it opens the text tower, and what it never does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, EMBED_DIM, SCALE, colour_picture, make_tiny_bundle

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.classify import Prediction, ZeroShotClassifier
from edgeclip.errors import BackendError, BundleError, ConfigError, InputError
from edgeclip.labels import LabelBank, LabelSet, Templates
from edgeclip.runtime.latency import StageClock
from edgeclip.runtime.session import RuntimeOptions

ONE_THREAD = RuntimeOptions(threads=1)
NAMES = tuple(COLOURS)


@pytest.fixture
def classifier(tiny_bundle_session: Path) -> Iterator[ZeroShotClassifier]:
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as opened:
        yield opened


def _photo(name: str, size: tuple[int, int] = (200, 150)) -> Image.Image:
    return Image.fromarray(colour_picture(name)).resize(size)


def _encoded(name: str, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    _photo(name).save(stream, form)
    return stream.getvalue()


# -- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-int8"])
def test_every_colour_is_named(tiny_bundle_session: Path, variant: str) -> None:
    with ZeroShotClassifier.open(tiny_bundle_session, variant=variant, options=ONE_THREAD) as classifier:
        for name in NAMES:
            assert classifier.classify(colour_picture(name, seed=7))[0].label == name


def test_scores_are_the_softmax_of_scaled_similarities(classifier: ZeroShotClassifier) -> None:
    answers = classifier.classify(colour_picture("cyan"), top_k=len(NAMES))
    similarity = np.array([each.similarity for each in answers])
    expected = np.exp(SCALE * (similarity - similarity.max()))
    np.testing.assert_allclose([each.score for each in answers], expected / expected.sum(), rtol=1e-5)
    assert sorted(similarity, reverse=True) == similarity.tolist()
    assert sum(each.score for each in answers) == pytest.approx(1, abs=1e-6)


def test_all_kinds_of_sources_agree(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(_encoded("red"))
    pixels = np.asarray(_photo("red"))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), _photo("red"), pixels]
    answers = [classifier.classify(source) for source in sources]
    assert all(answer == answers[0] for answer in answers)
    assert classifier.classify(pixels[..., ::-1], channels="bgr") == answers[0]
    assert answers[0][0].label == "red"


def test_an_iterable_gives_a_list_a_picture(classifier: ZeroShotClassifier) -> None:
    pictures = [colour_picture(name) for name in NAMES] * 3
    expected = [classifier.classify(picture) for picture in pictures]
    for images in (
        pictures,
        iter(pictures),
        np.stack(pictures),
        (Image.fromarray(each) for each in pictures),
    ):
        answers = classifier.classify(images)
        assert [[each.label for each in answer] for answer in answers] == [
            [each.label for each in answer] for answer in expected
        ]
        # another batch size may round the last bits of float32 otherwise
        np.testing.assert_allclose(_scores(answers), _scores(expected), atol=1e-6)
    assert classifier.classify([]) == []


def _scores(answers: list[list[Prediction]]) -> list[list[float]]:
    return [[each.similarity for each in answer] for answer in answers]


def test_an_array_of_the_towers_size_goes_through_unchanged(classifier: ZeroShotClassifier) -> None:
    pixels = colour_picture("blue")
    embedding = classifier.embed_images(pixels)
    assert embedding.tolist() == classifier.embed_images(Image.fromarray(pixels)).tolist()
    backwards = np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1]  # not contiguous
    assert embedding.tolist() == classifier.embed_images(backwards).tolist()


def test_top_k_is_limited_by_the_labels(classifier: ZeroShotClassifier) -> None:
    assert len(classifier.classify(colour_picture("red"), top_k=100)) == len(NAMES)
    assert len(classifier.classify(colour_picture("red"), top_k=1)) == 1
    for bad in (0, -1, 1.5, True, "3"):
        with pytest.raises(ConfigError, match=r"top_k: got"):
            classifier.classify(colour_picture("red"), top_k=bad)  # type: ignore[arg-type]


def test_predictions_are_frozen_values() -> None:
    prediction = Prediction("red", 0.5, 0.25)
    assert prediction == Prediction("red", 0.5, 0.25)
    with pytest.raises(AttributeError):
        prediction.score = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no picture", "no picture format known"),
        (b"", "empty"),
        ("missing.jpg", r"missing.jpg'.*no such file"),
        (np.zeros((2, 2, 3), np.float32), "expected uint8"),
        (object(), "expected a path"),
        (3, "expected a path"),
        ([colour_picture("red"), b"x"], "no picture format known"),
    ],
)
def test_bad_pictures_are_input_errors(classifier: ZeroShotClassifier, source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classifier.classify(source)


def test_a_tower_that_gives_no_numbers_is_said(classifier: ZeroShotClassifier) -> None:
    nothing = np.full((1, EMBED_DIM), np.nan, np.float32)
    with pytest.raises(BackendError, match="gave no numbers"):
        classifier.answer(nothing)


# -- embeddings --------------------------------------------------------------------------------------------


def test_image_embeddings_are_unit_and_exact(tiny_bundle_session: Path) -> None:
    with (
        ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD, fast_decode=True) as fast,
        ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as exact,
    ):
        photo = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
        Image.fromarray(noise).save(photo, "JPEG")
        embedding = fast.embed_images(photo.getvalue())
        assert embedding.shape == (EMBED_DIM,)
        assert embedding.tolist() == exact.embed_images(photo.getvalue()).tolist()
        assert fast.classify(photo.getvalue()) != exact.classify(photo.getvalue())
        several = exact.embed_images([photo.getvalue(), colour_picture("red")])
        assert several.shape == (2, EMBED_DIM)
        np.testing.assert_allclose(np.linalg.norm(several, axis=1), 1, atol=1e-6)
        assert exact.embed_images([]).shape == (0, EMBED_DIM)


def test_golden_embeddings_are_met(tiny_bundle_session: Path) -> None:
    from edgeclip.tensors import read_tensors

    bundle = Bundle.open(tiny_bundle_session)
    assert bundle.manifest.golden is not None
    golden, _ = read_tensors(bundle.read(bundle.manifest.golden))
    with ZeroShotClassifier.open(bundle, variant="onnx-fp32", options=ONE_THREAD) as classifier:
        # the reference evaluator of the onnx package against ONNX Runtime
        np.testing.assert_allclose(
            classifier.embed_images(golden["images"]), golden["image_embedding"], atol=1e-5
        )
        texts = [f"a photo of a {name}." for name in NAMES]
        np.testing.assert_allclose(classifier.embed_texts(texts), golden["text_embedding"], atol=1e-5)


def test_text_embeddings(classifier: ZeroShotClassifier) -> None:
    assert classifier.embed_texts("red").shape == (EMBED_DIM,)
    assert classifier.embed_texts(["red", "blue"]).shape == (2, EMBED_DIM)
    long = "red " * 50
    with pytest.raises(InputError, match=r"text 1 \('red red.*truncate=True"):
        classifier.embed_texts(["red", long])
    assert classifier.embed_texts([long], truncate=True).shape == (1, EMBED_DIM)


# -- labels ------------------------------------------------------------------------------------------------


def test_default_labels_until_others_are_set(classifier: ZeroShotClassifier) -> None:
    assert classifier.bank.names == NAMES
    classifier.set_labels(["red", "green"])
    assert classifier.bank.names == ("red", "green")
    assert {each.label for each in classifier.classify(colour_picture("blue"))} == {"red", "green"}


def test_labels_of_the_default_bank_need_no_text_tower(classifier: ZeroShotClassifier) -> None:
    classifier.set_labels(["blue", "red"])
    assert classifier.text_tower_runs == 0


def test_new_labels_are_encoded_once(tiny_bundle_session: Path) -> None:
    for expected in (1, 0):
        with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD) as classifier:
            classifier.set_labels(["red", "dark red"])
            assert classifier.text_tower_runs == expected
            assert classifier.classify(colour_picture("red"))[0].label == "red"


def test_a_warm_start_imports_no_tokenizer(tiny_bundle_session: Path) -> None:
    code = (
        "import sys\nfrom edgeclip import ZeroShotClassifier\n"
        "with ZeroShotClassifier.open(sys.argv[1]) as c:\n"
        "    c.set_labels(['dark red', 'sea blue'])\n"
        "    c.classify(sys.argv[2])\n"
        "    print(c.text_tower_runs, 'edgeclip.tokenizer' in sys.modules, 'rich' in sys.modules)\n"
    )
    photo = tiny_bundle_session.parent / "red.jpg"
    _photo("red").save(photo)
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_bundle_session), str(photo)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert runs == [["1", "True", "False"], ["0", "False", "False"]]


@pytest.mark.parametrize("keep", [False, True])
def test_the_text_tower_is_closed_unless_kept(tiny_bundle_session: Path, keep: bool) -> None:
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD, keep_text_tower=keep) as classifier:
        classifier.set_labels(["dark red"])
        assert classifier._labels.text_tower_is_open is keep


def test_templates_default_to_those_of_the_bundle(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        bank = LabelBank.from_bytes(Bundle.open(tiny_bundle).read(_bank_file(tiny_bundle)))
        odd = LabelBank(bank.labels, bank.embeddings, Templates.of("my {}"), bank.space)
        writer.manifest["label_banks"]["colours"] |= {
            "file": writer.add("banks/odd.safetensors", odd.to_bytes()),
            "templates": "custom",
        }
        writer.commit()
    with ZeroShotClassifier.open(tiny_bundle, options=ONE_THREAD) as classifier:
        classifier.set_labels(["dark red"])
        assert classifier.bank.templates.texts == ("my {}",)
        classifier.set_labels(["dark red"], templates="openai-7")
        assert classifier.bank.templates.name == "openai-7"


def _bank_file(bundle: Path) -> str:
    return Bundle.open(bundle).manifest.label_banks["colours"].file


def test_chinese_labels_take_the_chinese_bank(tiny_bundle: Path) -> None:
    aliases = {"红色": "red", "蓝色": "blue"}
    with BundleWriter(tiny_bundle) as writer:
        bank = LabelBank.from_bytes(Bundle.open(tiny_bundle).read(_bank_file(tiny_bundle)))
        rows = bank.embeddings[[bank.names.index(name) for name in aliases.values()]]
        chinese = LabelBank(LabelSet.of(list(aliases)), rows, Templates.of("zh"), bank.space)
        writer.manifest["label_banks"]["zh"] = {
            "file": writer.add("banks/zh.safetensors", chinese.to_bytes()),
            "labels": 2,
            "templates": "zh",
            "variant": "onnx-fp32",
            "language": "zh",
        }
        writer.commit()
    with ZeroShotClassifier.open(tiny_bundle, options=ONE_THREAD) as classifier:
        assert classifier.bank.names == NAMES
        classifier.set_bundle_labels("zh")
        assert classifier.classify(colour_picture("red"))[0].label == "红色"
        classifier.set_labels(["蓝色", "红色"])
        assert classifier.bank.templates.name == "zh"
        assert classifier.classify(colour_picture("red"))[0].label == "红色"
        assert classifier.text_tower_runs == 0
        classifier.set_labels(["红色", "red"])
        assert classifier.bank.templates.name == "one"
        with pytest.raises(ConfigError, match="no labels in language 'fr'; it has en, zh"):
            classifier.set_bundle_labels("fr")


def test_a_finished_bank_can_be_set(classifier: ZeroShotClassifier, tmp_path: Path) -> None:
    classifier.set_labels(["dark red", "blue"])
    classifier.bank.save(tmp_path / "bank.safetensors")
    expected = classifier.classify(colour_picture("red"))
    classifier.set_labels(["black"])
    classifier.set_labels(LabelBank.open(tmp_path / "bank.safetensors"))
    assert classifier.classify(colour_picture("red")) == expected


def test_banks_of_other_spaces_are_refused(classifier: ZeroShotClassifier) -> None:
    rows = np.eye(1, EMBED_DIM, dtype=np.float32)
    labels, templates = LabelSet.of(["a"]), Templates.of("one")
    with pytest.raises(InputError, match="label bank of embedding space 'elsewhere'"):
        classifier.set_labels(LabelBank(labels, rows, templates, space="elsewhere"))
    with pytest.raises(InputError, match=r"label bank of 3 dimensions.*has 16"):
        classifier.set_labels(LabelBank(labels, np.eye(1, 3, dtype=np.float32), templates))


def test_a_failed_change_keeps_the_labels(classifier: ZeroShotClassifier) -> None:
    classifier.set_labels(["red", "blue"])
    for bad in (["red", "red"], [], "red,blue"):
        with pytest.raises(InputError):
            classifier.set_labels(bad)
    with pytest.raises(ConfigError, match="expected exactly one"):
        classifier.set_labels(["green"], templates="{} {}")
    assert classifier.bank.names == ("red", "blue")


def test_label_warnings(classifier: ZeroShotClassifier) -> None:
    classifier.set_labels(["red", "gato", "кошка", "very " * 40 + "red"])
    warnings = "\n".join(classifier.label_warnings())
    for expected in ("'gato'", "cyrillic letters", "1 of 4 labels are too long"):
        assert expected in warnings
    classifier.set_labels(["red", "blue"])
    assert classifier.label_warnings() == []


def test_a_slim_bundle_offers_its_bank_alone(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "slim", text_tower=False)
    with ZeroShotClassifier.open(tmp_path / "slim", options=ONE_THREAD) as classifier:
        assert classifier.classify(colour_picture("green"))[0].label == "green"
        classifier.set_labels(["blue", "green"])
        assert classifier.bank.names == ("blue", "green")
        assert classifier.classify(colour_picture("green"))[0].label == "green"
        with pytest.raises(BundleError, match="no text tower, and label 'pink' is not in its bank"):
            classifier.set_labels(["blue", "pink"])
        with pytest.raises(BundleError, match="no text tower, and these templates"):
            classifier.set_labels(["blue"], templates="bare")
        with pytest.raises(BundleError, match="no text tower"):
            classifier.embed_texts("red")
        assert classifier.label_warnings() == []


def test_no_labels_at_all(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest |= {"label_banks": {}, "default_bank": None, "heads": {}}
        writer.commit()
    with ZeroShotClassifier.open(tiny_bundle, options=ONE_THREAD) as classifier:
        with pytest.raises(ConfigError, match="no default labels"):
            classifier.classify(colour_picture("red"))
        classifier.set_labels(["red", "blue"])
        assert classifier.classify(colour_picture("red"))[0].label == "red"


def test_a_damaged_default_bank_is_a_bundle_error(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["label_banks"]["colours"]["file"] = writer.add("banks/bad.safetensors", b"x" * 50)
        writer.commit()
    with (
        ZeroShotClassifier.open(tiny_bundle, variant="onnx-fp32", options=ONE_THREAD) as classifier,
        pytest.raises(BundleError, match="label bank 'colours'"),
    ):
        classifier.classify(colour_picture("red"))


# -- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "workers"), [(1, None), (1, 1), (3, 2), (64, 4)])
def test_a_stream_keeps_the_order_and_goes_on(
    classifier: ZeroShotClassifier, batch_size: int, workers: int | None
) -> None:
    sources: list[Any] = [_encoded(name) for name in NAMES]
    sources[2:2] = [b"broken"]
    sources += [b"", np.zeros((1, 1), np.int32)]
    outcomes = list(classifier.classify_stream(sources, batch_size=batch_size, workers=workers, top_k=2))
    assert [outcome.source is source for outcome, source in zip(outcomes, sources, strict=True)] == [
        True
    ] * 11
    labels = [outcome.predictions[0].label if outcome.predictions else None for outcome in outcomes]
    assert labels == [*NAMES[:2], None, *NAMES[2:], None, None]
    errors = [outcome for outcome in outcomes if outcome.error]
    assert [type(outcome.error) for outcome in errors] == [InputError] * 3
    assert all(outcome.timing_ms is None for outcome in outcomes)


def test_a_stream_equals_single_calls(classifier: ZeroShotClassifier) -> None:
    sources = [_encoded(name) for name in NAMES]
    streamed = [list(outcome.predictions) for outcome in classifier.classify_stream(sources)]
    assert streamed == [classifier.classify(source) for source in sources]


def test_a_stream_draws_only_so_far_ahead(classifier: ZeroShotClassifier) -> None:
    drawn = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal drawn
        while True:
            drawn += 1
            yield colour_picture("red")

    stream = classifier.classify_stream(endless(), workers=2, batch_size=3)
    for _ in range(5):
        next(stream)
    assert drawn <= 6 + 3 + 2 * 2
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgeclip-decode")]


def test_results_come_before_a_slow_source_goes_on(classifier: ZeroShotClassifier) -> None:
    seen = 0

    def source() -> Iterator[np.ndarray]:
        for number in range(4):
            assert seen == number  # everything drawn before has been answered
            yield colour_picture("red")

    for _ in classifier.classify_stream(source(), ready=lambda: False):
        seen += 1
    assert seen == 4


def test_an_error_of_the_source_reaches_the_consumer(classifier: ZeroShotClassifier) -> None:
    def source() -> Iterator[np.ndarray]:
        yield colour_picture("red")
        raise ValueError("camera unplugged")

    with pytest.raises(ValueError, match="camera unplugged"):
        list(classifier.classify_stream(source()))


def test_a_stream_keeps_the_labels_it_started_with(classifier: ZeroShotClassifier) -> None:
    stream = classifier.classify_stream([colour_picture("red")] * 20)
    next(stream)
    classifier.set_labels(["green", "blue"])
    assert all(outcome.predictions[0].label == "red" for outcome in stream)


def test_streams_of_embeddings(classifier: ZeroShotClassifier) -> None:
    items = list(classifier.embed_stream([_encoded("red"), b"x", _encoded("blue")], batch_size=2))
    assert [item.error is None for item in items] == [True, False, True]
    assert items[0].embedding is not None
    np.testing.assert_allclose(items[0].embedding, classifier.embed_images(_encoded("red")), atol=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": 0}])
def test_stream_limits(classifier: ZeroShotClassifier, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        list(classifier.classify_stream([], **options))


# -- time --------------------------------------------------------------------------------------------------


def test_stages_are_timed(tiny_bundle_session: Path) -> None:
    clock = StageClock()
    with ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD, clock=clock) as classifier:
        classifier.set_labels(["dark red", "blue"])
        outcomes = list(classifier.classify_stream([_encoded("red")] * 5, batch_size=2))
    totals = clock.totals()
    assert list(totals) == [
        "open",
        "compile",
        "first_run",
        "decode",
        "resize",
        "tokenize",
        "text_tower",
        "image_tower",
        "head",
    ]
    assert {
        name: totals[name].items for name in ("decode", "resize", "image_tower", "head")
    } == dict.fromkeys(("decode", "resize", "image_tower", "head"), 5)
    assert totals["image_tower"].batch == 2
    assert [outcome.batch for outcome in outcomes] == [2, 2, 2, 2, 1]
    assert outcomes[0].timing_ms is not None
    assert list(outcomes[0].timing_ms) == ["decode", "resize", "image_tower", "head"]


# -- process -----------------------------------------------------------------------------------------------


def test_a_closed_classifier_says_so(tiny_bundle_session: Path) -> None:
    classifier = ZeroShotClassifier.open(tiny_bundle_session, options=ONE_THREAD)
    classifier.close()
    classifier.close()
    for call in (
        lambda: classifier.classify(colour_picture("red")),
        lambda: classifier.embed_images(colour_picture("red")),
        lambda: classifier.embed_texts("red"),
        lambda: classifier.set_labels(["red"]),
        lambda: next(classifier.classify_stream([])),
    ):
        with pytest.raises(BackendError, match="closed"):
            call()


_FORK = """
import json, os, sys
from edgeclip import BackendError, ZeroShotClassifier
import numpy as np
picture = np.zeros((32, 32, 3), np.uint8)
classifier = ZeroShotClassifier.open(sys.argv[1])
classifier.set_labels(["red", "blue"])
before = classifier.classify(picture)
said = []
child = os.fork()
if not child:
    for call in (lambda: classifier.classify(picture), lambda: classifier.set_labels(["red"]),
                 lambda: list(classifier.classify_stream([picture])), lambda: classifier.embed_texts("a")):
        try:
            call()
        except BackendError as error:
            said.append("fork" in str(error))
    classifier.close()
    with ZeroShotClassifier.open(sys.argv[1]) as own:
        own.set_labels(["red", "blue"])
        said.append(own.classify(picture) == before)
    print(json.dumps(said), flush=True)
    os._exit(0)
os.waitpid(child, 0)
assert classifier.classify(picture) == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_told_and_can_open_its_own(tiny_bundle_session: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(tiny_bundle_session)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [True] * 5


def test_nothing_of_the_process_is_touched(tiny_bundle_session: Path) -> None:
    code = (
        "import os, signal, sys, threading\n"
        "handlers = [signal.getsignal(s) for s in sorted(signal.valid_signals())]\n"
        "environment, cwd = dict(os.environ), os.getcwd()\n"
        "import numpy as np\nfrom edgeclip import ZeroShotClassifier\n"
        "with ZeroShotClassifier.open(sys.argv[1]) as c:\n"
        "    c.set_labels(['dark red'])\n"
        "    list(c.classify_stream([np.zeros((40, 40, 3), np.uint8)] * 9))\n"
        "assert handlers == [signal.getsignal(s) for s in sorted(signal.valid_signals())]\n"
        "assert (environment, cwd) == (dict(os.environ), os.getcwd())\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle_session)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
