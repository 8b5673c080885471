"""The report: what stands on the page, that nothing is fetched, and odd runs."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_serving.errors import InvalidSource
from byol_training.config import HeadConfig
from byol_training.curves import Series, chart, show, ticks
from byol_training.data import load_images
from byol_training.evaluate import EVALUATION_FILE
from byol_training.online import OnlineScores
from byol_training.pretrain import pretrain
from byol_training.recipes import small_config
from byol_training.report import duration, write_report
from byol_training.thumbnails import project


class Page(HTMLParser):
    """Checks that tags nest, and collects what the tests ask for."""

    VOID = frozenset({"meta", "img", "line", "circle", "path", "image", "rect", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("circle", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty, dark and bright, and one file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, level in (("<dark>", 0), ("bright", 180)):
        (root / name).mkdir()
        for number in range(20):
            picture = rng.integers(0, 60, (16, 16, 3)) + level
            Image.fromarray(picture.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    (root / "bright" / "<script>.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first & last"
    config = small_config(
        image_size=16,
        batch_size=8,
        epochs=3,
        log_every=5,
        head=HeadConfig(hidden=16, out=8),
        device="cpu",
    )
    images = load_images(pictures, 16)
    pretrain(images, config, folder, on_epoch=OnlineScores(images, config, folder, every=1))
    return folder


@pytest.fixture(scope="module")
def page(run: Path, pictures: Path) -> Page:
    return Page(write_report(run, run / "report.html", source=pictures).read_text())


def test_it_holds_every_section(page: Page) -> None:
    wanted = ["Curves", "Scores", "Nearest neighbours", "Map", "Rejected files", "Configuration"]
    headings = {attributes.get("id") for tag, attributes in page.seen if tag == "h2"}
    assert {"-".join(each.lower().split()) for each in wanted} <= headings
    assert "Training run first & last" in page.text
    assert "kNN accuracy, trained" in page.text
    assert "of 15 steps done" in page.text
    assert "optimizer.lr" in page.text
    assert "not an image file" in page.text  # why the bad file was rejected


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    links = [
        value
        for _, attributes in page.seen
        for name, value in attributes.items()
        if name in ("href", "src") and value is not None
    ]
    assert len(links) > 50
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.seen}


def test_pictures_and_charts_are_described(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.seen if tag == "img"]
    assert pictures
    assert all(each["alt"] for each in pictures)
    assert any("same class" in str(each["alt"]) for each in pictures)
    charts = [attributes for tag, attributes in page.seen if tag == "svg"]
    assert len(charts) >= 5 + 6  # the loop's readings, scores while training, and the map
    assert all(each["role"] == "img" and each["aria-label"] for each in charts)
    assert any(str(each["aria-label"]).startswith("Loss: ") for each in charts)


def test_scores_are_kept_and_used_again(run: Path, pictures: Path, page: Page) -> None:
    kept = run / EVALUATION_FILE
    scores = json.loads(kept.read_text())
    scores["trained"]["rankme"], scores["trained"]["spread"] = 1.1, 0.01
    original = kept.read_text()
    kept.write_text(json.dumps(scores))
    again = Page(write_report(run, run / "again.html", source=pictures).read_text())
    kept.write_text(original)
    assert "The embedding has collapsed" in again.text
    assert "The embedding has not collapsed" in page.text


def test_without_labels_encoders_are_compared_by_view_retrieval(run: Path, page: Page) -> None:
    kept = run / EVALUATION_FILE
    original = json.loads(kept.read_text())
    keys = ("view_retrieval", "rankme", "spread")
    bare = {name: {key: each[key] for key in keys} for name, each in original.items()}
    bare["trained"]["view_retrieval"], bare["untrained"]["view_retrieval"] = 0.5, 0.75
    kept.write_text(json.dumps(bare))
    found = Page(write_report(run, run / "bare.html").read_text())
    kept.write_text(json.dumps(original))
    assert "View retrieval 50.0% against 75.0% of the untrained network" in found.text
    assert "raw pixels" not in found.text


def test_without_images_it_shows_what_the_run_kept(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "rejected.jsonl", "samples.npy"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    found = Page(write_report(tmp_path, tmp_path / "report.html").read_text())
    assert "Not scored yet" in found.text
    assert sum(tag == "image" for tag, _ in found.seen) == 40


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match="no checkpoint"):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_chart_needs_two_points() -> None:
    assert chart(Series(title="loss", x=[1], y=[2])) == ""
    assert chart(Series(title="loss", x=[1, 2], y=[2, float("nan")])) == ""
    assert "lowest 1, highest 3" in chart(Series(title="loss", x=[1, 2, 9], y=[2, 3, 1]))
    assert "<svg" in chart(Series(title="flat", x=[1, 2], y=[0, 0]))


def test_many_points_become_means_and_keep_the_last() -> None:
    drawn = chart(Series(title="loss", x=range(10_000), y=range(10_000)))
    assert drawn.count("<circle") < 250
    assert "step 9,999: 9,999" in drawn


def test_ticks_are_round() -> None:
    assert ticks(0.12, 0.87, 3, padded=True) == pytest.approx([0, 0.5, 1.0])
    assert ticks(3, 97, 4) == pytest.approx([3, 50, 97])
    assert ticks(5, 5, 3, padded=True)[0] <= 5


def test_figures_as_people_write_them() -> None:
    shown = [show(each) for each in (0, 12_000, 0.035, 1e-6, -3.60412)]
    assert shown == ["0", "12,000", "0.035", "1e-06", "-3.604"]
    assert [duration(each) for each in (45.2, 725, 12_000)] == ["45 s", "12 min 5 s", "3 h 20 min"]


@pytest.mark.parametrize(("count", "dim"), [(1, 4), (5, 1), (20, 8), (60, 8)])
def test_any_number_of_images_has_a_map(count: int, dim: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    places = project(rows)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()


def test_alike_images_lie_together_on_the_map() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.eye(2, 8), 40, axis=0) + 0.05 * rng.normal(size=(80, 8))
    places = project(rows.astype(np.float32))
    first, second = places[:40], places[40:]
    apart = np.linalg.norm(first.mean(axis=0) - second.mean(axis=0))
    assert apart > 2 * max(first.std(axis=0).max(), second.std(axis=0).max())
