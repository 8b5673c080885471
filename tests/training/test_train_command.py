"""`byol train`, as it is typed."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from byol_cli.train import command
from byol_serving.errors import InvalidConfig
from training.test_data import png, write


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def answer(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json").stdout.splitlines()[-1])
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "images", {f"{i}.png": png(i, (40, 30)) for i in range(40)})


def test_recipes_are_listed_with_their_sources() -> None:
    text = run("--recipe", "list").output
    assert "cifar-lightly" in text
    assert "arXiv 2006.07733" in text
    assert answer("--recipe", "list")["imagenet"]["config"]["batch_size"] == 4096


def test_recipe_with_changes_cache_and_resume(tmp_path: Path, source: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "cache"
    words: list[str | Path] = [source, "--out", out, "--cache", cache, "--device", "cpu"]
    changes = ["--recipe", "small", "--batch-size", "8", "--epochs", "2", "--accumulate", "2"]
    found = answer(*words, *changes)
    assert (found["images"], found["step"], found["epoch"]) == (40, 10, 2.0)
    config = json.loads((out / "config.json").read_text())
    assert (config["encoder"], config["batch_size"], config["accumulate"]) == ("small", 8, 2)
    assert len(list(cache.iterdir())) == 1
    with pytest.raises(InvalidConfig, match="holds a run already"):
        run(*words, *changes)
    assert answer(*words, "--resume")["run"] == str(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "soon"], "no duration; write it as 30m"),
        ([], "give SOURCE and --out"),
    ],
)
def test_wrong_usage(words: list[str], said: str) -> None:
    found = run(*words)
    assert found.exit_code == 2
    assert said in found.output


def test_a_budget_says_what_it_chose_and_ends_in_time(tmp_path: Path, source: Path) -> None:
    found = run(source, "--out", tmp_path / "run", "--budget", "12s", "--json", "--device", "cpu")
    assert "small at 32 pixels: " in found.stderr
    assert "chosen: small at 32 pixels, batch 20" in found.stderr
    last = json.loads(found.stdout.splitlines()[-1])
    assert last["step"] == last["steps"] > 1
    # Of 12 s, loading and measuring here took their part; the schedules ended with the rest.
    assert 4.0 < last["seconds"] < 12.0 * 1.1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tau"] > 0.999
