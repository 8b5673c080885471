"""The commands on collections, by a server and on an unserved store."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from byol_cli.main import cli
from byol_serving.client import Client
from byol_serving.collections import database
from byol_serving.collections.types import Metadata
from serving.support import make_bundle, png, random_pixels, reference

BYOL = [sys.executable, "-m", "byol_cli.main"]
COMMANDS = [
    "verify",
    "backup",
    "restore",
    "get",
    "items",
    "set-metadata",
    "delete",
    "export",
    "import",
    "duplicates",
    "outliers",
    "classify",
    "calibrate-pairs",
    "verify-pairs",
]
PIXELS = random_pixels(24, seed=9)
PIXELS[20:] = PIXELS[:4]  # four copies
ROWS = reference(PIXELS)
IDS = [f"{'cat' if n % 2 else 'dog'}/{n}.png" for n in range(24)]


@dataclass(frozen=True)
class Site:
    address: str
    root: Path

    def byol(self, *words: str | Path, code: int = 0) -> dict[str, Any]:
        """What a command answers in JSON."""
        server = () if "--store" in words else ("--server", self.address)
        command = [*BYOL, *map(str, words), *server, "--json"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == code, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1]) if run.stdout else {}
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    make_bundle(root / "bundle")
    for name, pixels in zip(IDS, PIXELS, strict=True):
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(png(pixels))
    command = [*BYOL, "serve", "--bundle", "bundle", "--store", "store", "--backups", "backups"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())["serving"]
    with Client(address) as client:
        client.create_collection("photos")
        metadata: list[Metadata] = [{"n": n, "label": name[:3]} for n, name in enumerate(IDS)]
        client.upsert("photos", IDS, images=PIXELS, metadata=metadata)
    yield Site(address, root)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    process.stdout.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = CliRunner().invoke(cli, ["collections", command, "--help"]).output
    assert f"byol collections {command} " in text
    assert "Example:" in text
    assert "--json" in text
    assert "\\b" not in text


def test_searching(site: Site) -> None:
    photo = site.root / "photos" / IDS[5]
    best = [IDS[n] for n in np.argsort(-(ROWS @ ROWS[5]), kind="stable")]
    hits = site.byol("search", photo, "-c", "photos", "-k", "3", "--offset", "2")["hits"]
    assert [hit["id"] for hit in hits] == best[2:5]
    np.save(site.root / "five.npy", ROWS[5])
    by_vector = site.byol("search", "--vector", site.root / "five.npy", "-c", "photos", "-k", "3")
    assert [hit["id"] for hit in by_vector["hits"]] == best[:3]
    mixed = ROWS[[5, 6]].mean(axis=0) - 0.5 * ROWS[7]
    order = [IDS[n] for n in np.argsort(-(ROWS @ mixed), kind="stable") if n not in (6, 7)]
    words = ("search", photo, "--id", IDS[6], "--unlike", f"id:{IDS[7]}", "--unlike-weight", "0.5")
    found = site.byol(*words, "-c", "photos", "-k", "4")["hits"]
    assert [hit["id"] for hit in found] == order[:4]
    groups = site.byol("search", photo, "-c", "photos", "-k", "2", "--group-by", "label")["groups"]
    assert {group["value"] for group in groups} == {"cat", "dog"}
    assert groups[0]["hits"][0]["id"] == IDS[5]
    diverse = site.byol("search", photo, "-c", "photos", "-k", "5", "--mmr-lambda", "0.2")["hits"]
    assert [hit["id"] for hit in diverse] != best[:5]
    site.byol("search", "-c", "photos", code=2)


def test_items(site: Site) -> None:
    site.byol("collections", "create", "few", "--dim", "2", "--encoder-id", "e")
    with Client(site.address) as client:
        rows = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
        client.upsert("few", list("abcd"), vectors=rows, metadata=[{"n": n} for n in range(4)])
    items = site.byol("collections", "items", "few", "--where", '{"n": {"gt": 0}}', "--limit", "2")
    assert items["items"] == [{"id": "b", "metadata": {"n": 1}}, {"id": "c", "metadata": {"n": 2}}]
    site.byol("collections", "set-metadata", "few", "a", '{"new": [1, null]}')
    got = site.byol("collections", "get", "few", "d", "a", "--vectors")["items"]
    assert [each["id"] for each in got] == ["d", "a"]
    assert (got[1]["metadata"], got[0]["vector"]) == ({"new": [1, None]}, [0.0, 1.0])
    assert site.byol("collections", "delete", "few", "a", "never")["deleted"] == 1
    assert site.byol("collections", "delete", "few", "--where", '{"n": [1, 2]}')["deleted"] == 2
    stats = site.byol("collections", "stats", "few")
    assert (stats["count"], stats["kind"], stats["recall"]) == (1, "flat", 1.0)
    site.byol("collections", "delete", "few", code=2)
    site.byol("collections", "set-metadata", "few", "d", "[1]", code=2)
    assert site.byol("collections", "get", "few", "a", code=1)["error"] == "UnknownId"


def test_duplicates_with_a_picture(site: Site) -> None:
    picture = site.root / "duplicates.png"
    words = ("duplicates", "-c", "photos", "--min-score", "0.9999")
    found = site.byol("collections", *words, "--images", site.root / "photos", "--picture", picture)
    assert [sorted(group["ids"]) for group in found["groups"]] == [
        sorted([IDS[n], IDS[n + 20]]) for n in range(4)
    ]
    assert (found["pairs"], found["items"], found["exact"], found["drawn"]) == (4, 24, True, 4)
    with Image.open(picture) as image:
        assert image.size == (200, 400)
        sheet = np.asarray(image).astype(int)
    assert np.abs(sheet[:96, :96] - sheet[:96, 100:196]).max() == 0  # copies look alike
    assert np.abs(sheet[:96, :96] - sheet[100:196, :96]).max() > 50
    gone = site.byol("collections", *words, "--images", site.root, "--picture", picture)
    assert gone["drawn"] == 0
    site.byol("collections", *words, "--picture", picture, code=2)


def test_outliers_labels_and_pairs(site: Site) -> None:
    outliers = site.byol("collections", "outliers", "-c", "photos", "-k", "2", "--limit", "3")
    assert len(outliers["outliers"]) == 3
    query = site.root / "photos" / IDS[5]
    words = ("classify", query, f"id:{IDS[20]}", "-c", "photos", "--key", "label", "-k", "1")
    labels = site.byol("collections", *words)["results"]
    assert [each["label"] for each in labels] == ["cat", "dog"]
    assert labels[0]["confidence"] == 1.0
    same = [f"photos/{IDS[n]},id:{IDS[n + 20]},1" for n in range(4)]
    different = [f"photos/{IDS[n]},id:{IDS[n + 8]},0" for n in range(4)]
    csv = site.root / "pairs.csv"
    csv.write_text("\n".join(["left,right,same", *same, *different]) + "\n")
    out = site.root / "calibration.json"
    made = site.byol("collections", "calibrate-pairs", csv, "-c", "photos", "--out", out)
    assert made["accuracy"] == 1.0
    assert json.loads(out.read_text()) == made
    pair = ("verify-pairs", query, f"id:{IDS[5]}", "-c", "photos", "--calibration", out)
    assert site.byol("collections", *pair)["same"] is True
    other = ("verify-pairs", query, f"id:{IDS[9]}", "-c", "photos", "--threshold", "0.9999")
    assert site.byol("collections", *other)["same"] is False
    csv.write_text("left,right,same\na.png,b.png,maybe\n")
    site.byol("collections", "calibrate-pairs", csv, "-c", "photos", code=2)


def test_out_to_parquet_and_in_again(site: Site) -> None:
    file = site.root / "photos.parquet"
    made = site.byol("collections", "export", "photos", file)
    assert (made["items"], made["changed_meanwhile"]) == (24, False)
    first = site.byol("collections", "import", "again", file, "--index", "flat")
    assert (first["inserted"], first["updated"]) == (24, 0)
    second = site.byol("collections", "import", "again", file)
    assert (second["inserted"], second["updated"]) == (0, 24)
    with Client(site.address) as client:
        old, new = client.collection("photos"), client.collection("again")
        assert (new.encoder_id, new.dim, new.count) == (old.encoder_id, old.dim, 24)
        pairs = zip(
            client.items("photos", with_vectors=True),
            client.items("again", with_vectors=True),
            strict=True,
        )
        for before, after in pairs:
            assert (before.id, before.metadata) == (after.id, after.metadata)
            np.testing.assert_allclose(
                np.asarray(before.vector), np.asarray(after.vector), atol=1e-6
            )


def test_integer_ids_go_out_and_in_as_integers(site: Site) -> None:
    words = ("numbers", "--id-type", "int64", "--dim", "3", "--encoder-id", "mine")
    assert site.byol("collections", "create", *words)["id_type"] == "int64"
    with Client(site.address) as client:
        client.upsert("numbers", [5, -(2**63), 40], vectors=np.eye(3, dtype=np.float32))
    assert site.byol("collections", "get", "numbers", "40")["items"]
    file = site.root / "numbers.parquet"
    site.byol("collections", "export", "numbers", file)
    table = pq.read_table(file)
    assert table.schema.field("id").type == pa.int64()
    assert table.column("id").to_pylist() == [5, -(2**63), 40]
    assert site.byol("collections", "import", "numbers-too", file)["inserted"] == 3
    with Client(site.address) as client:
        assert client.collection("numbers-too").id_type == "int64"
        assert [item.int_id for item in client.items("numbers-too")] == [5, -(2**63), 40]


def test_keeping_by_a_server_and_without(site: Site) -> None:
    assert site.byol("collections", "verify", "photos")["ok"] is True
    made = site.byol("collections", "backup", "monday")
    assert "photos" in made["collections"]
    restored = site.byol("collections", "restore", "monday", "photos", "--name", "old")
    assert (restored["name"], restored["count"]) == ("old", 24)
    copy, unserved = site.root / "copy", site.root / "unserved"
    shutil.copytree(made["path"], copy)
    words = ("restore", copy, "photos", "--store", unserved)
    assert site.byol("collections", *words)["count"] == 24
    assert site.byol("collections", "verify", "photos", "--store", unserved)["ok"] is True
    target = site.root / "tuesday"
    again = site.byol("collections", "backup", target, "--store", unserved)
    assert again["collections"] == ["photos"]
    # A metadata text that was changed behind the store's back.
    file = unserved / "photos" / database.FILE
    data = bytearray(file.read_bytes())
    at = data.find(b'"label":"cat"')
    data[at + 9 : at + 12] = b"cow"
    file.write_bytes(data)
    found = site.byol("collections", "verify", "photos", "--store", unserved, code=1)
    assert found["ok"] is False
    assert "checksum" in found["problems"][0]
