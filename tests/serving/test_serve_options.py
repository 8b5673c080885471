"""The options of `byol serve`: complete, documented, and from four places with one precedence."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from byol_cli.serve import build_config, command
from byol_serving.config import ServeConfig, TlsConfig
from byol_serving.errors import InvalidConfig
from byol_serving.images import ImageLimits
from serving.support import make_bundle

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
OWN_WAY = {"tls", "limits"}  # fields made of several options


def options() -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and p.name != "as_json"]


def table() -> str:
    """docs/serving.md's table of options, as it should be."""
    rows = ["| option | environment | default | |", "| --- | --- | --- | --- |"]
    context = click.Context(command)
    for option in options():
        extra = option.get_help_extra(context)
        default = extra.get("default", "")
        if isinstance(option.type, click.Choice):
            kind = " one of " + ", ".join(map(str, option.type.choices))
        else:
            kind = ""
        rows.append(
            f"| `{option.opts[0]}` | `BYOL_SERVE_{(option.name or '').upper()}` |"
            f" {default} | {option.help}{kind and f' ({kind.strip()})'} |"
        )
    return "\n".join(rows)


def test_every_option_is_documented_as_it_is() -> None:
    wanted = table()
    assert wanted in DOCUMENT.read_text(), f"put this into docs/serving.md:\n\n{wanted}\n"


def test_every_setting_has_an_option_with_the_same_default() -> None:
    given = {option.name for option in options()}
    fields = {field.name: field for field in dataclasses.fields(ServeConfig)}
    assert fields.keys() - OWN_WAY <= given
    of_an_image = {"max_image_bytes", "max_image_pixels", "max_image_seconds"}
    made = {"config", "tls_cert", "tls_key", "tls_client_ca"} | of_an_image
    assert given - fields.keys() == made
    with command.make_context("serve", ["--store", "s"], auto_envvar_prefix="NOTHING") as context:
        settings = {k: v for k, v in context.params.items() if k != "as_json"}
    assert build_config(settings) == ServeConfig(store="s")


def parsed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> dict[str, Any]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with command.make_context("serve", arguments, auto_envvar_prefix="BYOL_SERVE") as context:
        return context.params


def test_command_line_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax-batch = 2\nthreads = 3\ninsecure = true\nhost = "::1"\n')
    environment = {"BYOL_SERVE_MAX_BATCH": "20", "BYOL_SERVE_THREADS": "30"}
    found = parsed(["--config", str(file), "--threads", "300"], monkeypatch, environment)
    assert (found["threads"], found["max_batch"], found["port"]) == (300, 20, 1)
    assert (found["insecure"], found["host"], found["stream_window"]) == (True, "::1", 8)
    # The file itself may be named by the environment.
    found = parsed([], monkeypatch, {"BYOL_SERVE_CONFIG": str(file)})
    assert found["port"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown settings prot"),
        ("[port", "is not TOML"),
        ("config = 'other.toml'", "unknown settings config"),
        (None, "cannot be read"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "serve.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        command.make_context("serve", ["--config", str(file)])


def test_a_value_of_the_wrong_kind_names_its_option(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = "many"')
    ran = CliRunner().invoke(command, ["--config", str(file), "--store", "s"])
    assert ran.exit_code == 2
    assert "--port" in ran.output


def test_options_that_belong_together(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    file = tmp_path / "a"
    settings: dict[str, Any] = {
        "store": tmp_path,
        "max_image_bytes": 5,
        "max_image_pixels": 6,
        "max_image_seconds": 7.0,
        "tls_cert": file,
        "tls_key": file,
        "tls_client_ca": None,
    }
    config = build_config(settings)
    assert config.tls == TlsConfig(cert=file, key=file)
    assert config.limits == ImageLimits(max_bytes=5, max_pixels=6, max_seconds=7.0)
    for wrong in ({"tls_key": None}, {"tls_cert": None}):
        with pytest.raises(InvalidConfig, match="both --tls-cert and --tls-key"):
            build_config(settings | wrong)


def test_the_settings_are_said_at_the_start_with_secrets_masked(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny").path
    endpoint = "http://me:hunter2@127.0.0.1:9/v1/traces?key=hunter2"
    words = ["--bundle", str(bundle), "--port", "0", "--log-format", "json", "--metrics-port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "byol_cli.main", "serve", *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BYOL_SERVE_OTEL_ENDPOINT": endpoint},
    )
    try:
        assert server.stdout is not None
        assert json.loads(server.stdout.readline())["serving"].startswith("127.0.0.1:")
        server.send_signal(signal.SIGHUP)  # reads the bundle again, and goes on
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "hunter2" not in log
    lines = [json.loads(line) for line in log.splitlines()]
    (said,) = [line for line in lines if line["message"].startswith("settings: ")]
    assert said["settings"]["otel_endpoint"] == "http://***@127.0.0.1:9/v1/traces?***"
    assert "log_format=json (option)" in said["message"]
    assert "v1/traces?*** (environment)" in said["message"]
    assert "host=127.0.0.1," in said["message"]
    assert any(line["message"].startswith("SIGTERM: draining") for line in lines)
