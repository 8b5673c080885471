"""`byol report`: a run on one self-contained HTML page.

Everything is read from the run directory; given the images too, the page shows them, and scores the
run if `byol evaluate` has not yet.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from byol_serving.errors import InvalidSource
from byol_training.checkpoint import find_checkpoint
from byol_training.curves import Series, chart, show
from byol_training.data import Images, images_from_arrays
from byol_training.evaluate import (
    EVALUATION_FILE,
    Subject,
    bank_and_queries,
    evaluate,
    open_subject,
)
from byol_training.online import read_scores
from byol_training.page import page, table, tiles
from byol_training.pretrain import SAMPLES_FILE
from byol_training.thumbnails import contact_sheet, embedding_map

_CURVES = {
    "loss": ("Loss", "of both directions, 0 .. 8"),
    "spread": ("Spread of the projections", "towards 0 is collapse"),
    "lr": ("Learning rate", ""),
    "tau": ("τ of the target network", "to 1 at the end"),
    "images_per_s": ("Images per second", ""),
}
"""Readings of metrics.jsonl that have a name of their own; other numbers follow under theirs."""
_COUNTERS = {"step", "steps", "epoch", "epochs", "seconds", "seconds_left"}
MEASURES = {
    "knn_accuracy": ("kNN accuracy", "higher", "vote of the 20 nearest, weighted"),
    "logistic_accuracy": ("Linear probe, logistic", "higher", "L2 chosen on a held-out tenth"),
    "sgd_probe_accuracy": ("Linear probe, SGD", "higher", "the paper's linear evaluation"),
    "few_shot_10_percent": ("Few-shot, 10% of labels", "higher", "mean of three draws"),
    "few_shot_1_percent": ("Few-shot, 1% of labels", "higher", "one image a class at least"),
    "precision_at_10": ("Precision at 10", "higher", "of the ten nearest, those of the class"),
    "mean_average_precision": ("Mean average precision", "higher", "over the whole ranking"),
    "view_retrieval": ("View retrieval", "higher", "a view finds its other view among all"),
    "stability": ("Neighbour stability", "higher", "of the ten nearest, those of before"),
    "alignment": ("Alignment", "lower", "distance between two views; 0 is collapse"),
    "rankme": ("RankMe", "", "effective dimensions; near 1 is collapse"),
    "uniformity": ("Uniformity", "", "0 is collapse, lower is more spread"),
    "spread": ("Spread", "", "0 is collapse, 1 is isotropic"),
}
"""Name, which way is better, and what it says; in the order of the table. The last three tell
collapse, not how good an encoder is (docs/evaluation.md): neither way is better."""
_REJECTED = 200  # listed at most
_COLLAPSED_RANK, _COLLAPSED_SPREAD = 2.0, 0.1


def write_report(
    run: Path, out: Path, *, source: Path | None = None, queries: Path | None = None
) -> Path:
    """Writes the page.

    Args:
        run: a run directory.
        out: the HTML file.
        source: the images, a folder or tar; by default the 64 samples that the run kept.
        queries: images held back; every sixth of `source` by default.

    Returns:
        `out`.

    Raises:
        InvalidSource: no run there, or no images.
    """
    find_checkpoint(run)
    metrics = _lines(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text())
    subject = open_subject(run)
    bank, held = _images(run, source, queries, subject)
    scores = _evaluation(run, source, queries)
    rejected = _lines(run / "rejected.jsonl")
    sections = [
        ("At a glance", tiles(_facts(config, metrics, scores, rejected))),
        ("What the scores say", _verdict(scores)),
        ("Curves", _curves(metrics, run)),
        ("Scores", _scores_table(scores)),
        ("Nearest neighbours", _neighbours(subject, bank, held)),
        ("Map", embedding_map(held, subject.embed(held.pixels))),
        ("Rejected files", _rejected_table(rejected)),
        ("Configuration", _configuration(config)),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        page(
            f"Training run {run.resolve().name}",
            _lead(config, metrics),
            sections,
            footer="Written by byol report; everything on this page is in this file.",
        )
    )
    return out


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise InvalidSource(f"{path} is missing; give a run directory of byol train")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _images(
    run: Path, source: Path | None, queries: Path | None, subject: Subject
) -> tuple[Images, Images]:
    """Images to look among and images to ask with."""
    if source is not None:
        return bank_and_queries(source, queries, subject.preprocess)
    samples = images_from_arrays(np.load(run / SAMPLES_FILE))
    return samples, samples


def _evaluation(
    run: Path, source: Path | None, queries: Path | None
) -> dict[str, dict[str, float]]:
    """What `byol evaluate` found, or finds now; nothing without either."""
    kept = run / EVALUATION_FILE
    if not kept.exists() and source is not None:
        kept.write_text(json.dumps(evaluate(run, source, queries), indent=2) + "\n")
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    return found


def _lead(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    epochs = f", {metrics[-1]['epoch']:.4g} epochs" if metrics else ""
    return (
        f"BYOL, encoder {config['encoder']} at {config['image_size']} pixels,"
        f" batches of {config['batch_size']}{epochs}"
    )


def _facts(
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, float]],
    rejected: Sequence[object],
) -> list[tuple[str, str]]:
    facts = [
        (f"kNN accuracy, {name}", f"{100 * each['knn_accuracy']:.1f}%")
        for name, each in scores.items()
        if "knn_accuracy" in each
    ]
    if metrics:
        last = metrics[-1]
        rates = sorted(line["images_per_s"] for line in metrics)
        facts += [
            ("training time", duration(last["seconds"])),
            ("images per second, median", show(round(rates[len(rates) // 2]))),
            (f"of {last['steps']:,} steps done", f"{last['step']:,}"),
        ]
    return [*facts, ("files rejected", f"{len(rejected):,}")]


def duration(seconds: float) -> str:
    """As people say it: 45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    match whole:
        case _ if whole < 60:
            return f"{whole} s"
        case _ if whole < 3600:
            return f"{whole // 60} min {whole % 60} s"
        case _:
            return f"{whole // 3600} h {whole % 3600 // 60} min"


def _verdict(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Sentences that a user without a feeling for the figures can act on."""
    if not scores:
        return "<p>Not scored yet: give byol report the images too, or run byol evaluate first.</p>"
    trained = scores["trained"]
    # Without labels only encoders are compared: raw pixels find views by their colours.
    measure = "knn_accuracy" if "knn_accuracy" in trained else "view_retrieval"
    others = ("untrained", "pixels") if measure == "knn_accuracy" else ("untrained",)
    said = [_collapse(trained)] + [
        _against(measure, trained, scores[name], name) for name in others if name in scores
    ]
    items = "".join(
        f"<li class={kind}><b>{word}</b> {escape(text)}</li>" for kind, word, text in said
    )
    return f"<ul class=verdict>{items}</ul>"


def _collapse(trained: Mapping[str, float]) -> tuple[str, str, str]:
    rank, spread = trained["rankme"], trained["spread"]
    figures = f"RankMe {rank:.1f}, spread {spread:.2f}"
    if rank < _COLLAPSED_RANK or spread < _COLLAPSED_SPREAD:
        return "bad", "Bad", f"The embedding has collapsed ({figures}): lower the learning rate."
    return "good", "Good", f"The embedding has not collapsed ({figures})."


def _against(
    measure: str, trained: Mapping[str, float], other: Mapping[str, float], name: str
) -> tuple[str, str, str]:
    ours, theirs = 100 * trained[measure], 100 * other[measure]
    points = ours - theirs
    what = {"untrained": "the untrained network", "pixels": "raw pixels"}[name]
    text = f"{MEASURES[measure][0]} {ours:.1f}% against {theirs:.1f}% of {what}"
    if points > 1:
        return "good", "Good", f"{text}: {points:.1f} points more."
    if points > -1:
        return "warn", "Open", f"{text}: no clear gain; train for longer or on more images."
    return "bad", "Bad", f"{text}: {-points:.1f} points less; training did harm."


def _curves(metrics: Sequence[Mapping[str, Any]], run: Path) -> str:
    """Readings of the training loop, then scores while training where there were any."""
    numbers = {
        key
        for line in metrics
        for key, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    others = sorted(numbers - set(_CURVES) - _COUNTERS)
    named = {**_CURVES, **{key: (key.replace("_", " "), "") for key in others}}
    charts = [_series(metrics, key, *names) for key, names in named.items()]
    online = read_scores(run)
    for key, (name, better, _) in MEASURES.items():
        note = f"online, {better} is better" if better else "online"
        charts.append(_series(online, key, name, note))
    return f"<div class=charts>{''.join(charts)}</div>"


def _series(lines: Sequence[Mapping[str, Any]], key: str, title: str, note: str) -> str:
    known = [line for line in lines if isinstance(line.get(key), int | float)]
    return chart(
        Series(
            title=title,
            note=note,
            x=[line["step"] for line in known],
            y=[line[key] for line in known],
        )
    )


def _scores_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return ""
    rows = [
        [name, *(_figure(each.get(key)) for each in scores.values()), better, meaning]
        for key, (name, better, meaning) in MEASURES.items()
        if key in scores["trained"]
    ]
    header = ["measure", *scores, "better", "what it is"]
    return table(header, rows, numbers=len(scores))


def _figure(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _neighbours(subject: Subject, bank: Images, held: Images) -> str:
    key = ""
    if bank.labels is not None and held.labels is not None:
        key = "<p>Green: of the asked image's class. Red and dashed: of another.</p>"
    rows, asked = subject.embed(bank.pixels), subject.embed(held.pixels)
    return key + contact_sheet(bank, rows, held, asked)


def _rejected_table(rejected: Sequence[Mapping[str, str]]) -> str:
    if not rejected:
        return "<p>None: every file could be read.</p>"
    listed = table(["file", "why"], [[r["path"], r["reason"]] for r in rejected[:_REJECTED]])
    more = len(rejected) - _REJECTED
    return listed + (f"<p>and {more:,} more, in rejected.jsonl</p>" if more > 0 else "")


def _configuration(config: Mapping[str, Any]) -> str:
    """Every setting by its full name."""

    def flat(values: Mapping[str, Any], where: str) -> list[list[str]]:
        rows: list[list[str]] = []
        for name, value in values.items():
            if isinstance(value, Mapping):
                rows += flat(value, f"{where}{name}.")
            else:
                rows.append([where + name, json.dumps(value).strip('"')])
        return rows

    rows = flat(config, "")
    return (
        f"<details><summary>{len(rows)} settings, as in config.json</summary>"
        f"{table(['setting', 'value'], rows)}</details>"
    )
