"""The soak for a few seconds, and that it would see what it looks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from byol_serving.pb.byol.v1 import byol_pb2 as pb
from byol_serving.rpc.convert import embeddings_to_tensor
from soak.load import Load
from soak.material import make_material


def test_a_few_seconds_under_fire() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", "soak.run", "--seconds", "8"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-3000:] + run.stdout[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["ended"].keys() >= {"good", "bad", "stream", "switch", "killed", "features"}
    assert report["ended"]["good"]["OK"] > 10
    assert report["memory_after_mib"] <= report["memory_limit_mib"]


def test_another_images_vector_and_another_encoders_are_faults(tmp_path: Path) -> None:
    material = make_material(tmp_path, count=4)
    load = Load("nowhere:1", material)
    first, second = material.golden
    rows = material.golden[first][[0, 2]]
    answer = pb.EmbedResponse(embeddings=embeddings_to_tensor(rows), encoder_id=first)
    load._compare(answer, [0, 2], "good")
    assert not load.outcome.faults
    load._compare(answer, [2, 0], "good")
    answer.encoder_id = second
    load._compare(answer, [0, 2], "good")
    assert len(load.outcome.faults) == 2
    assert np.abs(material.golden[first] - material.golden[second]).max() > 0.1
