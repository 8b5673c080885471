"""The bundle: what is written comes back; whatever was truncated, altered or foreign is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from byol_serving.bundle import (
    GOLDEN_FILE,
    INFO_FILE,
    MODEL_FILE,
    Bundle,
    cosine_distance,
    load_bundle,
    write_bundle,
)
from byol_serving.errors import AlreadyExists, InvalidBundle
from serving.support import DIM, SIZE, make_bundle, random_pixels, reference, tiny_model


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def change(bundle: Bundle, **facts: object) -> None:
    path = bundle.path / INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_bundle_comes_back_as_it_was_written(bundle: Bundle) -> None:
    found = load_bundle(bundle.path)
    assert found == bundle
    assert len(found.info.encoder_id) == 64
    pixels, embeddings = found.golden()
    np.testing.assert_array_equal(embeddings, reference(pixels))


def test_the_encoders_identity_is_its_graphs(tmp_path: Path, bundle: Bundle) -> None:
    assert make_bundle(tmp_path / "same").info.encoder_id == bundle.info.encoder_id
    assert make_bundle(tmp_path / "other", seed=1).info.encoder_id != bundle.info.encoder_id


def test_nothing_but_a_bundle_is_ever_overwritten(tmp_path: Path, bundle: Bundle) -> None:
    def write(path: Path, overwrite: bool) -> Bundle:
        golden = random_pixels(1)
        return write_bundle(
            path, tiny_model(1), bundle.info, golden, reference(golden, 1), overwrite=overwrite
        )

    with pytest.raises(AlreadyExists, match="choose another path"):
        write(bundle.path, overwrite=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(AlreadyExists):
        write(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert write(bundle.path, overwrite=True).info.encoder_id != bundle.info.encoder_id
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bundle", "mine"]


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_refused_by_name(bundle: Bundle, name: str, harm: str) -> None:
    path = bundle.path / name
    data = bytearray(path.read_bytes())
    match harm:
        case "truncated":
            path.write_bytes(data[:-1])
        case "altered":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "missing":
            path.unlink()
    with pytest.raises(InvalidBundle, match=rf"{name} is .*export the bundle again"):
        load_bundle(bundle.path)


def test_what_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle, match="make one with byol export"):
        load_bundle(tmp_path)
    (tmp_path / INFO_FILE).write_text("{")
    with pytest.raises(InvalidBundle, match="is not JSON"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format_version": 2}, "bundle format 2, this version reads 1"),
        ({"dim": None, "preprocess": {}}, "lacks or misstates a field"),
        ({"preprocess": {"size": -3}}, "lacks or misstates a field"),
        ({"features": [{"nonsense": 1}]}, "lacks or misstates a field"),
        ({"golden_sha256": 7}, "lacks or misstates a field"),
        ({"weights_sha256": 7}, "lacks or misstates a field"),
    ],
)
def test_facts_that_cannot_be_are_refused(
    bundle: Bundle, facts: dict[str, object], message: str
) -> None:
    change(bundle, **facts)
    with pytest.raises(InvalidBundle, match=message):
        load_bundle(bundle.path)


def test_facts_of_a_later_minor_version_are_passed_over(bundle: Bundle) -> None:
    change(bundle, something_new=[1, 2])
    assert load_bundle(bundle.path).info == bundle.info


def test_cosine_distance() -> None:
    one = np.array([[1, 0], [1, 0], [1, 0], [0, 0]], np.float32)
    other = np.array([[2, 0], [0, 3], [-1, 0], [1, 0]], np.float32)
    found = cosine_distance(one, other)
    np.testing.assert_allclose(found[:3], [0, 1, 2])
    assert np.isnan(found[3])


def test_the_supporting_bundle_has_the_facts_that_tests_rely_on(bundle: Bundle) -> None:
    assert (bundle.info.dim, bundle.info.preprocess.size) == (DIM, SIZE)
