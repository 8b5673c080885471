"""What watches the server: metrics and their dashboard, probes, logs, traces."""

import asyncio
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from byol_serving.client import AsyncClient, Retry
from byol_serving.config import ServeConfig
from byol_serving.errors import InvalidConfig, InvalidImage
from byol_serving.gpu_memory import gpu_memory
from byol_serving.logs import JsonFormatter
from byol_serving.metrics_merged import merged
from byol_serving.server import Running, serving
from serving.rpc.two_processes import get as ask
from serving.support import make_bundle, png, random_pixels

FILES = [png(each) for each in random_pixels(3)]
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny").path


async def get(running: Running, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(ask, running.metrics_port, path)


async def samples(running: Running) -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels, in the order of the labels' names."""
    status, text = await get(running, "/metrics")
    assert status == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_what_happened(bundle: Path) -> None:
    config = ServeConfig(bundle=bundle, port=0, metrics_port=0)
    async with serving(config) as running, AsyncClient(running.address, timeout=20) as client:
        await client.embed(FILES)
        with pytest.raises(InvalidImage):
            await client.embed([b"no image"])
        info = await client.encoder()
        found = await samples(running)
    embed = "/byol.v1.Embedder/Embed"
    assert found["byol_requests_total", "OK", embed] == 1
    assert found["byol_requests_total", "INVALID_ARGUMENT", embed] == 1
    assert found["byol_rejected_total", "InvalidImage"] == 1
    assert found["byol_request_seconds_count", embed] == 2
    assert found["byol_requests_in_flight",] == 0
    assert found["byol_images_total", "tiny", "decode"] == 4
    assert found["byol_images_total", "tiny", "inference"] == 3
    assert found["byol_wait_seconds_count", "tiny", "inference"] == 1
    assert found["byol_batch_images_sum", "tiny", "inference"] == 3
    assert 0 < found["byol_batch_seconds_sum", "tiny", "inference"] < 10
    assert found["byol_queue_images", "tiny", "inference", info.version] == 0
    assert found["byol_accepted_images", "tiny", info.version] == 0
    known = (info.encoder_id, "yes", "tiny", "fp32", info.provider, info.version)
    assert found["byol_model_info", *known] == 1
    assert found["process_resident_memory_bytes",] > 0


async def test_the_dashboard_draws_exactly_the_exported_names(bundle: Path) -> None:
    config = ServeConfig(bundle=bundle, port=0, metrics_port=0)
    async with serving(config) as running, AsyncClient(running.address, timeout=20) as client:
        await client.embed(FILES)
        with pytest.raises(InvalidImage):
            await client.embed([b""])
        exported = {name for name, *_ in await samples(running)}
        # Without a GPU this one is announced, and has no samples.
        assert "# TYPE byol_gpu_memory_bytes gauge" in (await get(running, "/metrics"))[1]
        exported.add("byol_gpu_memory_bytes")
    panels = json.loads(DASHBOARD.read_text())["panels"]
    drawn = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"\b(?:byol|process)_\w+", target["expr"])
    }
    assert drawn <= exported
    base = re.compile("_(bucket|sum|count)$")
    ours = {base.sub("", name) for name in exported if name.startswith("byol_")}
    assert {base.sub("", name) for name in drawn if name.startswith("byol_")} == ours


def test_gpu_memory_is_what_the_driver_says_or_nothing() -> None:
    for number, each in enumerate(gpu_memory()):
        assert each.gpu == number
        assert 0 <= each.used <= each.total


def test_merged_metrics_say_whose_they_are() -> None:
    text = (
        b"# HELP byol_images_total Images.\n# TYPE byol_images_total counter\n"
        b'byol_images_total{step="decode"} 3.0\n'
        b"# HELP byol_gpu_memory_bytes Memory.\n# TYPE byol_gpu_memory_bytes gauge\n"
        b'byol_gpu_memory_bytes{gpu="0"} 7.0\n'
    )
    lines = merged({0: text, 2: text}).decode().splitlines()
    assert lines[:4] == [
        "# HELP byol_images_total Images.",
        "# TYPE byol_images_total counter",
        'byol_images_total{process="0",step="decode"} 3.0',
        'byol_images_total{process="2",step="decode"} 3.0',
    ]
    # All processes see the same GPU, and a sum must not count it for each.
    assert lines[6:] == ['byol_gpu_memory_bytes{gpu="0",process="0"} 7.0']


async def test_probes(bundle: Path) -> None:
    config = ServeConfig(bundle=bundle, port=0, metrics_port=0)
    async with serving(config) as running:
        assert (await get(running, "/healthz"))[0] == 200
        assert (await get(running, "/readyz?verbose"))[0] == 200
        assert (await get(running, "/other"))[0] == 404
        assert await running.drain(5)
        assert (await get(running, "/healthz"))[0] == 200
        assert (await get(running, "/readyz"))[0] == 503


async def test_a_taken_port_is_named(bundle: Path) -> None:
    async with serving(ServeConfig(bundle=bundle, port=0, metrics_port=0)) as running:
        taken = ServeConfig(bundle=bundle, port=0, metrics_port=running.metrics_port)
        with pytest.raises(InvalidConfig, match=f"metrics on 127.0.0.1:{running.metrics_port}"):
            async with serving(taken):
                pass


async def test_slow_calls_are_logged_with_their_steps(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServeConfig(bundle=bundle, port=0, slow_seconds=1e-6)
    async with serving(config) as running, AsyncClient(running.address, timeout=20) as client:
        await client.embed(FILES)
    (record,) = [each for each in caplog.records if each.name == "byol.slow"]
    line = json.loads(JsonFormatter().format(record))
    assert line["method"] == "/byol.v1.Embedder/Embed"
    assert [(step["step"], step["items"]) for step in line["steps"]] == [
        ("decode", 3),
        ("inference", 3),
    ]
    assert sum(step["wait_ms"] + step["work_ms"] for step in line["steps"]) <= line["ms"]
    assert f"request_id={line['request_id']}" in line["message"]


def test_a_json_line_holds_extras_and_tracebacks() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("byol.rpc", logging.ERROR, "f", 1, "bad %s", ("luck",), info)
    record.request_id = "seven"
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "byol.rpc", "bad luck")
    assert line["request_id"] == "seven"
    assert line["exception"].endswith("ValueError: two\nlines")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


async def test_a_trace_spans_client_queue_decode_and_inference(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("byol_serving.tracing.otlp_provider", lambda endpoint: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    config = ServeConfig(bundle=bundle, port=0, otel_endpoint="http://127.0.0.1:4318/v1/traces")
    async with serving(config) as running, AsyncClient(running.address, retry=Retry()) as client:
        await client.embed(FILES)
        with pytest.raises(InvalidImage):
            await client.embed([b""])
        spans = exporter.get_finished_spans()
    method = "byol.v1.Embedder/Embed"
    client_span, failed = [s for s in spans if s.name == method and s.kind.name == "CLIENT"]
    (server,) = [
        s
        for s in spans
        if s.name == method and s.parent and s.parent.span_id == client_span.context.span_id
    ]
    assert server.kind.name == "SERVER"
    assert server.context.trace_id == client_span.context.trace_id
    inner = sorted(
        (s for s in spans if s.parent and s.parent.span_id == server.context.span_id),
        key=lambda s: s.start_time or 0,
    )
    assert [(s.name, (s.attributes or {})["byol.step"]) for s in inner] == [
        ("queue", "decode"),
        ("decode", "decode"),
        ("queue", "inference"),
        ("inference", "inference"),
    ]
    for span in inner:
        assert (server.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0)
        assert (span.end_time or 0) <= (server.end_time or 0)
    (refused,) = [s for s in spans if s.parent and s.parent.span_id == failed.context.span_id]
    assert refused.status.description == "InvalidImage"
    assert not failed.status.is_ok
