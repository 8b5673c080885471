"""The Ray engine, on a real cluster of several nodes on this machine: the local engine's bytes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from byol_serving.bundle import Bundle
from byol_serving.encoder import Encoder
from byol_serving.errors import Unavailable
from serving.piles import embed, file_bytes, image_files, rows_in, small_plan, write_folder
from serving.support import DIM, encoded

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
COUNT, SHARD = 320, 8
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes, each a raylet of its own; removed one by one when done."""
    from ray.cluster_utils import Cluster

    memory = 2**27
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": memory}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=memory)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that take a while to decode, as many names for a few files; some bad ones."""
    root = tmp_path_factory.mktemp("source")
    dice = np.random.default_rng(0)
    for number in range(8):
        coarse = Image.fromarray(dice.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        large = coarse.resize((700, 700), Image.Resampling.BICUBIC)
        (root / f"{number}.bin").write_bytes(encoded(large, "PNG", compress_level=1))
    (root / "bad.bin").write_bytes(b"bad")
    (root / "images").mkdir()
    for number in range(COUNT):
        kind = "bad" if number % 50 == 7 else str(number % 8)
        (root / "images" / f"{number:04}.png").hardlink_to(root / f"{kind}.bin")
    return root / "images"


def driver(source: Path, bundle: Bundle, out: Path, *more: str) -> list[str]:
    words = ["embed", str(source), "--bundle", str(bundle.path), "--out", str(out), "--quiet"]
    sizes = ["--shard-size", str(SHARD), "--batch-size", "4", "--threads", "1"]
    return [sys.executable, "-m", "byol_cli.main", *words, *sizes, *more]


def finished(out: Path) -> int:
    return len(list((out / "_byol" / "journal").glob("part-*.jsonl")))


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_is_lost_and_the_driver_killed_and_nothing_is_missing(
    cluster: Any, source: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out, local = tmp_path / "ray", tmp_path / "local"
    words = driver(source, bundle, out, "--engine", "ray", "--ray-address", cluster.address)
    node = cluster.list_all_nodes()[-1]
    first = subprocess.Popen(words, env=ENVIRONMENT)
    wait_until(lambda: finished(out) >= 3, first)
    cluster.remove_node(node, allow_graceful=False)
    after = finished(out)
    wait_until(lambda: finished(out) >= after + 3, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = finished(out)
    assert 6 <= kept < COUNT // SHARD
    recorded = [out / f"part-{number:05d}.parquet" for number in range(kept)]
    times = [path.stat().st_mtime_ns for path in recorded]
    second = subprocess.run(words, env=ENVIRONMENT, check=False, timeout=200)
    assert second.returncode == 3  # some files are bad
    assert [path.stat().st_mtime_ns for path in recorded] == times
    subprocess.run(driver(source, bundle, local), env=ENVIRONMENT, check=False, timeout=200)
    assert len(rows_in(out)) == COUNT - len(range(7, COUNT, 50))
    assert file_bytes(out) == file_bytes(local)


@pytest.fixture
def session(cluster: Any) -> Iterator[None]:
    """This process as a driver."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("session")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_sync_on_ray_with_content_ids(bundle: Bundle, encoder: Encoder, tmp_path: Path) -> None:
    from byol_serving.indexing import ray_engine
    from byol_serving.indexing.sinks import ParquetSink

    files = image_files(12)
    source = write_folder(tmp_path / "images", {**files, "x/again.png": files["cat/000.png"]})
    out = tmp_path / "out"
    embed(source, out, encoder, ids="sha256")
    (source / "cat" / "000.png").unlink()
    (source / "ant.png").write_bytes(files["dog/001.png"])
    (source / "new.png").write_bytes(image_files(1, seed=3)["cat/000.png"])
    info = encoder.bundle.info
    plan = small_plan(source, out, ids="sha256", sync=True)
    summary = ray_engine.run(plan, bundle, ParquetSink(info.dim, info.encoder_id), device="cpu")
    assert (summary.duplicates, summary.removed, summary.rejected) == (1, 0, 0)
    embed(source, tmp_path / "anew", encoder, ids="sha256")
    ours, wanted = rows_in(out), rows_in(tmp_path / "anew")
    assert list(ours) == list(wanted)
    assert [row["source"] for row in ours.values()] == [row["source"] for row in wanted.values()]


@pytest.mark.usefixtures("session")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_feature_maps_on_ray_are_the_local_engines(
    bundle: Bundle, encoder: Encoder, tmp_path: Path
) -> None:
    from byol_serving.indexing import ray_engine
    from byol_serving.indexing.columns import columns_of
    from byol_serving.indexing.pipeline import run
    from byol_serving.indexing.sinks import ParquetSink

    source = write_folder(tmp_path / "images", image_files(12))
    columns = columns_of(bundle.info, ["cells"], normalize=False)
    sink = ParquetSink(DIM, bundle.info.encoder_id, columns)
    ray_engine.run(small_plan(source, tmp_path / "ray"), bundle, sink, device="cpu")
    run(small_plan(source, tmp_path / "local"), [encoder], sink)
    parts = sorted((tmp_path / "local").glob("part-*"))
    assert len(parts) == 2
    for part in parts:
        assert part.read_bytes() == (tmp_path / "ray" / part.name).read_bytes()


def test_no_cluster_is_an_error_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    from byol_serving.indexing import ray_engine
    from byol_serving.indexing.sinks import NpySink

    source = write_folder(tmp_path / "images", image_files(1))
    for address in ("127.0.0.1:9", "nowhere"):
        with pytest.raises(Unavailable, match=f"no Ray cluster at {address}"):
            ray_engine.run(small_plan(source, tmp_path), bundle, NpySink(DIM), address=address)
