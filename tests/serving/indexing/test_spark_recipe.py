"""The Spark recipe of docs/offline.md, run as it stands there on a real local Spark."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from serving.piles import assert_close, image_files, write_folder

pytest.importorskip("pyspark", reason="pyspark is not installed (pip install pyspark)")
pytest.importorskip("pandas", reason="pandas is not installed")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java, which is not installed", allow_module_level=True)

DOCUMENT = (Path(__file__).parents[3] / "docs" / "offline.md").read_text()


def recipe() -> str:
    (found,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
        if "spark" in block
    )
    return str(found)


def test_the_recipe_gives_the_vectors_of_the_encoder_and_names_bad_files(
    tmp_path: Path, bundle: Bundle, encoder: Encoder
) -> None:
    files = image_files(20)
    write_folder(tmp_path / "photos", files | {"cat/bad.png": b"no image"})
    shutil.copytree(bundle.path, tmp_path / "bundles" / "photos")
    (tmp_path / "recipe.py").write_text(recipe())
    run = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = pq.read_table(tmp_path / "vectors-spark").to_pylist()
    name = {row["id"]: row["id"].split("/photos/")[1] for row in rows}
    assert sorted(name.values()) == sorted([*files, "cat/bad.png"])
    good = [row for row in rows if row["error"] is None]
    assert_close([(row["embedding"], files[name[row["id"]]]) for row in good], encoder)
    (bad,) = (row for row in rows if row["error"] is not None)
    assert (name[bad["id"]], bad["embedding"]) == ("cat/bad.png", None)
