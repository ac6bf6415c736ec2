"""Which variant a host runs, what is passed over and why, and int8 that must prove itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import make_tiny_bundle
from tuned_profiles import put_profile, tuned_profile
from wrong_bundle import put_wrong_model

from edgeclip import classify
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.cache import HostCache
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, BackendUnavailableError, BundleError
from edgeclip.runtime import RuntimeOptions, choose_variant, open_tower, parity
from edgeclip.runtime.byte_sums import UnsafeIsaWarning
from edgeclip.runtime.choose import TUNED, profile_name, version_fits
from edgeclip.runtime.host import Host, engine_versions
from edgeclip.text_encoder import text_variant

VNNI = replace(Host.here(), isa=frozenset({"avx2", "fma", "avx_vnni"}))
AVX2 = replace(Host.here(), isa=frozenset({"avx2", "fma"}))
SILENT = replace(Host.here(), isa=None)


def changed(path: Path, variant: str, **fields: Any) -> Bundle:
    with BundleWriter(path) as writer:
        writer.manifest["variants"][variant].update(fields)
        return writer.commit()


UNVERIFIED = {
    tower: {"status": "unverified", "proxy": "the same engine on x86_64"} for tower in ("image", "text")
}


def without_golden(path: Path) -> Bundle:
    with BundleWriter(path) as writer:
        writer.manifest["golden"] = None
        return writer.commit()


def test_the_first_default_variant_is_taken(tiny_bundle_session: Path) -> None:
    choice = choose_variant(Bundle.open(tiny_bundle_session))
    assert choice.variant.name == "onnx-int8"
    assert choice.reason == "first of the bundle's default variants"
    assert choice.skipped == ()


def test_a_named_variant_is_taken(tiny_bundle_session: Path) -> None:
    choice = choose_variant(Bundle.open(tiny_bundle_session), variant="onnx-fp32")
    assert choice.variant.name == "onnx-fp32"
    assert choice.reason == "variant onnx-fp32 was asked for"


def test_an_unknown_name_lists_those_there_are(tiny_bundle_session: Path) -> None:
    with pytest.raises(BundleError, match=r"no variant 'onnx-int4'; it has \['onnx-fp32', 'onnx-int8'\]"):
        choose_variant(Bundle.open(tiny_bundle_session), variant="onnx-int4")


def test_an_instruction_set_this_host_lacks_is_passed_over_with_the_reason(tiny_bundle: Path) -> None:
    bundle = changed(tiny_bundle, "onnx-int8", requires={"isa_any": ["avx_vnni", "avx512_vnni"]})
    assert choose_variant(bundle, host=VNNI).variant.name == "onnx-int8"
    choice = choose_variant(bundle, host=AVX2)
    assert choice.variant.name == "onnx-fp32"
    assert choice.reason == "first of the bundle's default variants that runs here"
    assert choice.skipped == (
        ("onnx-int8", "it needs one of avx_vnni, avx512_vnni, this host has avx2, fma"),
    )
    ((_, reason),) = choose_variant(bundle, host=SILENT).skipped
    assert reason.endswith("this host does not tell what it has")


def test_a_named_variant_that_cannot_run_is_an_error_unless_allowed(tiny_bundle: Path) -> None:
    bundle = changed(tiny_bundle, "onnx-int8", requires={"isa_any": ["avx_vnni"]})
    with pytest.raises(
        BackendUnavailableError, match=r"'onnx-int8' cannot be run here: it needs one of avx_vnni"
    ):
        choose_variant(bundle, variant="onnx-int8", host=AVX2)
    options = RuntimeOptions(allow=frozenset({"unsafe-isa"}))
    with pytest.warns(
        UnsafeIsaWarning, match="'onnx-int8' is run although it needs one of avx_vnni, this host"
    ):
        choice = choose_variant(bundle, variant="onnx-int8", host=AVX2, options=options)
    assert choice.variant.name == "onnx-int8"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"requires": {"engine": ">=99"}}, "it needs ort >=99, this host has "),
        ({"format": "coreml"}, "this edgeclip does not know the format 'coreml'"),
        ({"requires": {"compute_capability": "8.7"}}, "it needs a GPU of capability 8.7"),
    ],
)
def test_what_else_passes_a_variant_over(tiny_bundle: Path, fields: dict[str, Any], reason: str) -> None:
    bundle = changed(tiny_bundle, "onnx-int8", **fields)
    choice = choose_variant(bundle, host=replace(Host.here(), gpus=()))
    assert choice.variant.name == "onnx-fp32"
    ((name, why),) = choice.skipped
    assert name == "onnx-int8"
    assert why.startswith(reason)


def test_a_format_whose_engine_is_not_installed_is_passed_over(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeclip.runtime.session._has_module", lambda name: name == "onnxruntime")
    ((name, why),) = choose_variant(changed(tiny_bundle, "onnx-int8", format="openvino")).skipped
    assert name == "onnx-int8"
    assert why.startswith("no backend for 'openvino' files is here (openvino: the package 'openvino' is not")


def test_what_is_unverified_and_cannot_be_checked_here_is_passed_over(tiny_bundle: Path) -> None:
    without_golden(tiny_bundle)
    bundle = changed(tiny_bundle, "onnx-int8", parity=UNVERIFIED)
    choice = choose_variant(bundle)
    assert choice.variant.name == "onnx-fp32"
    assert choice.skipped == (
        (
            "onnx-int8",
            "the numbers of its image tower are not verified, and without golden file cannot be here",
        ),
    )


def test_unverified_numbers_can_be_allowed(tiny_bundle: Path) -> None:
    without_golden(tiny_bundle)
    bundle = changed(tiny_bundle, "onnx-int8", parity={})
    options = RuntimeOptions(allow=frozenset({"unverified"}))
    assert choose_variant(bundle, options=options).variant.name == "onnx-int8"
    assert choose_variant(bundle, variant="onnx-int8").variant.name == "onnx-int8"


def test_when_nothing_fits_every_reason_is_given(tiny_bundle: Path) -> None:
    changed(tiny_bundle, "onnx-int8", requires={"isa_any": ["amx_int8"]})
    bundle = changed(tiny_bundle, "onnx-fp32", requires={"engine": ">=99"})
    with pytest.raises(BackendUnavailableError, match=r"onnx-int8: .* amx_int8.*onnx-fp32: it needs ort"):
        choose_variant(bundle, host=AVX2)


def test_choosing_loads_no_engine(tiny_bundle_session: Path) -> None:
    code = (
        "import sys; from edgeclip.bundle import Bundle; from edgeclip.runtime import choose_variant; "
        "choose_variant(Bundle.open(sys.argv[1])); "
        "print('onnxruntime' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle_session)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


# --- the tuned profile


def test_a_tuned_profile_goes_first_and_says_how_it_is_run(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle))
    choice = choose_variant(bundle)
    assert (choice.variant.name, choice.skipped) == ("onnx-fp32", ())
    assert choice.reason == (
        "the tuned profile of this device names it (for latency, 2026-11-22: ort, 1 thread)"
    )
    assert choice.options_for(RuntimeOptions()).threads == 1
    named = choose_variant(bundle, variant="onnx-int8")
    assert (named.variant.name, named.settings) == ("onnx-int8", None)
    assert named.options_for(RuntimeOptions()) == RuntimeOptions()


def test_a_tower_is_opened_as_the_profile_says(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle, settings={"backend": "openvino", "threads": 1}))
    with open_tower(bundle, choose_variant(bundle), "image") as session:
        assert (session.chosen.backend, session.chosen.threads) == ("openvino", 1)
    with open_tower(bundle, choose_variant(bundle), "text") as session:
        assert (session.chosen.backend, session.chosen.threads) == ("ort", Host.here().cores)


ONE_CPU = (min(os.sched_getaffinity(0)),)


@pytest.mark.parametrize(
    ("asked", "opened", "said"),
    [
        ({"threads": 1}, {"threads": 1, "spinning": True, "low_memory": True}, "; but threads 1 asked for)"),
        ({"threads": 3}, {"threads": 3}, "spinning, low memory)"),
        ({"spinning": False}, {"threads": 3, "spinning": False}, "; but spinning False asked for)"),
        (
            {"threads": 2, "low_memory": False},
            {"threads": 2, "low_memory": False, "spinning": True},
            "; but threads 2 and low_memory False asked for)",
        ),
        (
            {"affinity": ONE_CPU},
            {"threads": None, "affinity": ONE_CPU},
            f"; but CPUs {ONE_CPU[0]} asked for)",
        ),
    ],
    ids=["threads", "the same threads", "no spinning", "no low memory", "affinity"],
)
def test_what_is_asked_for_wins(
    asked: dict[str, Any], opened: dict[str, Any], said: str, tiny_bundle_session: Path
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    settings = {"threads": 3, "spinning": True, "low_memory": True}
    put_profile(bundle, tuned_profile(bundle, settings=settings))
    options = RuntimeOptions(**asked)
    choice = choose_variant(bundle, options=options)
    assert choice.variant.name == "onnx-fp32"
    assert choice.reason.endswith(said)
    applied = choice.options_for(options)
    assert {name: getattr(applied, name) for name in opened} == opened
    open_tower(bundle, choice, "image", options).close()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"backend": "openvino"}, "onnx-fp32: backend 'openvino' was asked for, and it is for 'ort'"),
        (
            {"providers": ("CPUExecutionProvider",)},
            "onnx-fp32: providers CPUExecutionProvider were asked for, and it was measured without",
        ),
    ],
)
def test_a_profile_for_something_else_than_was_asked_for_is_not_used(
    asked: dict[str, Any], why: str, tiny_bundle_session: Path
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle))
    choice = choose_variant(bundle, options=RuntimeOptions(**asked))
    assert (choice.variant.name, choice.settings) == ("onnx-int8", None)
    assert choice.skipped == ((TUNED, why),)
    assert choice.reason == "first of the bundle's default variants"


def test_each_device_has_its_own_profile(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle), device="gpu")
    assert choose_variant(bundle).settings is None
    assert profile_name("cuda:0") == profile_name("cuda") != profile_name("cuda:1")


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (b"{", "it is not JSON"),
        (b"[]", "it is of schema None, and this edgeclip reads 1"),
        (b'{"schema": 2, "variant": "onnx-fp32"}', "it is of schema 2, and this edgeclip reads 1"),
        (
            b'{"schema": 1, "kind": "tuned-profile"}',
            "it cannot be read (Object missing required field `goal`)",
        ),
        (b" " * ((1 << 20) + 1), "it has 1,048,577 bytes, which no profile has"),
    ],
    ids=["no JSON", "no object", "another schema", "a field missing", "too large"],
)
def test_a_profile_that_cannot_be_read_is_ignored_and_said(
    tiny_bundle_session: Path, profile: bytes, why: str
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, profile)
    choice = choose_variant(bundle)
    assert choice.variant.name == "onnx-int8"
    assert choice.skipped == ((TUNED, f"{why}: run `edgeclip tune` again"),)


CORES = Host.here().cores


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"cores": CORES + 6},
            f"it was measured on {CORES + 6} usable core(s), and {CORES} can be used now",
        ),
        (
            {"engines": {**engine_versions(), "onnxruntime": "1.2.3"}},
            (
                "it was measured with onnxruntime 1.2.3, and "
                f"{engine_versions().get('onnxruntime')} is installed now"
            ),
        ),
        (
            {"engines": {**engine_versions(), "tensorrt-rtx": "1.0"}},
            "it was measured with tensorrt-rtx 1.0, and it is not installed now",
        ),
        (
            {"engines": {name: it for name, it in engine_versions().items() if name != "openvino"}},
            "it was measured without openvino, and ",
        ),
        ({"variant": "gone"}, "it names the variant 'gone', which the bundle does not have"),
    ],
    ids=["cores", "engine", "engine gone", "engine new", "variant"],
)
def test_a_stale_profile_is_ignored_and_said(
    tiny_bundle_session: Path, changes: dict[str, Any], why: str
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, {**tuned_profile(bundle), **changes})
    choice = choose_variant(bundle)
    assert (choice.variant.name, choice.settings) == ("onnx-int8", None)
    assert choice.reason == "first of the bundle's default variants"
    ((name, said),) = choice.skipped
    assert name == TUNED
    assert said.startswith(why)
    assert said.endswith(": run `edgeclip tune` again")


def test_a_profile_that_older_engines_left_is_noticed(tiny_bundle_session: Path) -> None:
    """Another version is another fingerprint, so that the profile is in another folder."""
    bundle = Bundle.open(tiny_bundle_session)
    older = {**engine_versions(), "onnxruntime": "1.2.3"}
    put_profile(bundle, {**tuned_profile(bundle), "engines": older}, fingerprint="0123456789abcdef")
    ((_, why),) = choose_variant(bundle).skipped
    assert why.startswith("it was measured with onnxruntime 1.2.3, and ")
    put_profile(bundle, tuned_profile(bundle))
    assert choose_variant(bundle).variant.name == "onnx-fp32"


def test_a_profile_of_another_machine_that_shares_the_cache_is_not_ours(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    theirs = {**tuned_profile(bundle), "hardware": {"cpu": "another one"}}
    put_profile(bundle, theirs, fingerprint="0123456789abcdef")
    choice = choose_variant(bundle)
    assert (choice.variant.name, choice.skipped) == ("onnx-int8", ())


def test_a_profile_for_a_variant_that_cannot_run_is_ignored_and_said(tiny_bundle: Path) -> None:
    bundle = changed(tiny_bundle, "onnx-fp32", requires={"engine": ">=99"})
    put_profile(bundle, tuned_profile(bundle))
    choice = choose_variant(bundle)
    assert choice.variant.name == "onnx-int8"
    ((name, why),) = choice.skipped
    assert name == TUNED
    assert why.startswith("onnx-fp32: it needs ort >=99, this host has ")


def test_without_a_profile_nothing_of_it_is_loaded(tiny_bundle_session: Path) -> None:
    code = (
        "import sys; from edgeclip.bundle import Bundle; from edgeclip.runtime import choose_variant; "
        "choose_variant(Bundle.open(sys.argv[1])); print('edgeclip.runtime.tuned' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle_session)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_streams_take_batch_and_workers_of_the_profile(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    put_profile(bundle, tuned_profile(bundle, settings={"batch_size": 3, "workers": 2}))
    seen: list[tuple[int, int]] = []
    real = classify.decode_ahead

    def spy(images: Any, preprocess: Any, *, batch_size: int, workers: int, **more: Any) -> Any:
        seen.append((batch_size, workers))
        return real(images, preprocess, batch_size=batch_size, workers=workers, **more)

    monkeypatch.setattr(classify, "decode_ahead", spy)
    pictures = np.zeros((4, 32, 32, 3), np.uint8)
    with ZeroShotClassifier.open(bundle) as classifier:
        assert [outcome.batch for outcome in classifier.classify_stream(pictures)] == [3, 3, 3, 1]
        assert [each.batch for each in classifier.embed_stream(pictures, batch_size=2, workers=1)] == [2] * 4
    with ZeroShotClassifier.open(bundle, variant="onnx-fp32") as classifier:
        assert [outcome.batch for outcome in classifier.classify_stream(pictures)] == [1] * 4
    assert seen == [(3, 2), (2, 1), (1, CORES)]


# --- int8 proves itself


def stamps(bundle: Bundle) -> list[str]:
    directory = HostCache.open(bundle.digest, Host.here().fingerprint()).directory
    assert directory is not None
    return sorted(path.name for path in directory.glob("golden-*"))


def test_int8_is_checked_once_and_stamped(tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    with open_tower(bundle, choose_variant(bundle), "image") as session:
        assert session.chosen.precision == "int8"
    assert stamps(bundle) == ["golden-onnx-int8-ort-cpu.json"]
    numbers = json.loads(
        (HostCache.open(bundle.digest, Host.here().fingerprint())).get(stamps(bundle)[0]) or b""
    )
    assert numbers["n"] == 8

    def not_again(*args: object, **settings: object) -> None:
        raise AssertionError("the golden pictures were run again")

    monkeypatch.setattr(parity, "check_tower", not_again)
    open_tower(bundle, choose_variant(bundle), "image").close()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_verified_float_needs_no_proof(tiny_bundle_session: Path, tower: str) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    open_tower(bundle, bundle.variant("onnx-fp32"), tower).close()
    assert stamps(bundle) == []


def test_an_int8_text_tower_proves_itself_too(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    open_tower(bundle, bundle.variant("onnx-int8"), "text").close()
    assert stamps(bundle) == ["golden-onnx-int8-ort-cpu-text.json"]


def test_int8_proves_itself_again_where_sums_are_of_16_bits(
    tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An emulated processor says of itself what the one below it is: the fingerprint stays the same."""
    bundle = Bundle.open(tiny_bundle_session)
    open_tower(bundle, bundle.variant("onnx-int8"), "image").close()
    monkeypatch.setattr("edgeclip.runtime.choose.adds_in_16_bits", lambda backend: True)
    open_tower(bundle, bundle.variant("onnx-int8"), "image").close()
    assert stamps(bundle) == ["golden-onnx-int8-ort-cpu-16bit.json", "golden-onnx-int8-ort-cpu.json"]


def test_wrong_answers_are_explained_where_sums_overflow(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeclip.runtime.choose.adds_in_16_bits", lambda backend: True)
    bundle = put_wrong_model(tiny_bundle, tmp_path)
    expected = (
        r"wrong over 8 golden pictures: .* \(sums of bytes overflow: ort adds pairs of products in 16 bits "
        r"on this host, .+; variants for x86-avx2 fit, and float ones\)\. Open it with variant='onnx-fp32'"
    )
    with pytest.raises(BackendError, match=expected):
        open_tower(bundle, bundle.variant("onnx-int8"), "image")
    options = RuntimeOptions(allow=frozenset({"unsafe-isa"}))
    for _ in range(2):  # nothing is stamped
        with pytest.warns(UnsafeIsaWarning, match="wrong over 8 golden pictures: .*'unsafe-isa' is allowed"):
            open_tower(bundle, bundle.variant("onnx-int8"), "image", options).close()


def test_int8_that_answers_wrongly_here_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = put_wrong_model(tiny_bundle, tmp_path)
    expected = (
        r"'onnx-int8': its answers on this host are wrong over 8 golden pictures: cosine_mean is .*"
        r"Open it with variant='onnx-fp32'"
    )
    with pytest.raises(BackendError, match=expected):
        open_tower(bundle, choose_variant(bundle), "image")
    assert stamps(bundle) == []


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-int8"])
@pytest.mark.parametrize("parity_said", [{}, UNVERIFIED])
def test_what_was_not_verified_proves_both_towers_and_is_then_used(
    variant: str, parity_said: dict[str, Any], tiny_bundle: Path
) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["default_variants"] = [variant]
        writer.manifest["variants"][variant]["parity"] = parity_said
        bundle = writer.commit()
    choice = choose_variant(bundle)
    assert (choice.variant.name, choice.skipped) == (variant, ())
    assert choice.reason.endswith("; not verified where it was made, so golden pictures are run here first")
    for tower in ("image", "text"):
        open_tower(bundle, choice, tower).close()
    assert stamps(bundle) == [f"golden-{variant}-ort-cpu-text.json", f"golden-{variant}-ort-cpu.json"]


def test_what_was_not_verified_and_answers_wrongly_here_is_refused_unless_allowed(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    put_wrong_model(tiny_bundle, tmp_path, "onnx-fp32")
    bundle = changed(tiny_bundle, "onnx-fp32", parity=UNVERIFIED)
    expected = (
        r"'onnx-fp32': its answers on this host are wrong over 8 golden pictures: max_abs is .*"
        r"Open it with variant='onnx-int8'"
    )
    for _ in range(2):
        with pytest.raises(BackendError, match=expected):
            open_tower(bundle, choose_variant(bundle, variant="onnx-fp32"), "image")
    assert stamps(bundle) == []
    options = RuntimeOptions(allow=frozenset({"unverified"}))
    open_tower(bundle, bundle.variant("onnx-fp32"), "image", options).close()


def test_labels_are_encoded_by_a_text_tower_that_proved_itself(tiny_bundle: Path, tmp_path: Path) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    with BundleWriter(tiny_bundle) as writer:
        entry = writer.manifest["variants"]["onnx-fp32"]
        stored = writer.add("onnx-fp32/text.onnx", other.variant("onnx-fp32").tower("text").model)
        entry["towers"]["text"].update(model=stored, files=[stored])
        entry["parity"] = UNVERIFIED
        writer.commit()
    with (
        ZeroShotClassifier.open(tiny_bundle, variant="onnx-fp32") as classifier,
        pytest.raises(BackendError, match=r"'onnx-fp32': .* wrong over 8 golden texts: max_abs is "),
    ):
        classifier.set_labels(["mauve", "ochre"])


def test_a_text_tower_of_another_variant_is_one_that_runs_here(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        variants = writer.manifest["variants"]
        variants["onnx-int8"]["towers"].pop("text")
        variants["onnx-int8"]["parity"].pop("text")
        variants["another"] = {**variants["onnx-fp32"], "requires": {"isa_any": ["an_isa_of_the_future"]}}
        writer.manifest["default_variants"] = ["another", "onnx-int8", "onnx-fp32"]
        bundle = writer.commit()
    found = text_variant(bundle, bundle.variant("onnx-int8"))
    assert found is not None
    assert found.name == "onnx-fp32"


def test_without_a_cache_the_proof_is_repeated_and_nothing_fails(
    tiny_bundle_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    bundle = Bundle.open(tiny_bundle_session)
    for _ in range(2):
        with open_tower(bundle, choose_variant(bundle), "image") as session:
            session.run({"image": np.zeros((1, 32, 32, 3), np.uint8)})


def test_a_bundle_without_golden_file_still_opens(tiny_bundle: Path) -> None:
    bundle = without_golden(tiny_bundle)
    open_tower(bundle, choose_variant(bundle), "image").close()


@pytest.mark.parametrize(
    ("version", "spec", "fits"),
    [
        ("1.20.1", ">=1.20", True),
        ("1.9", ">=1.20", False),
        ("1.31.1", ">=1.20,<2", True),
        ("2.0", ">=1.20,<2", False),
        ("1.20", "==1.20.0", True),
        ("1.20.1", "!=1.20.1", False),
        ("1.21.0.dev5", ">1.20", True),
        ("1.2", "~=1.0", None),
        ("unknown", ">=1", None),
    ],
)
def test_version_specifications(version: str, spec: str, fits: bool | None) -> None:
    assert version_fits(version, spec) is fits
