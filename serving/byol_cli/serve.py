"""`byol serve`: the gRPC server.

An option comes from the command line, or else from the environment (BYOL_SERVE_ and its name), or
else from the file of --config, or else it has its default. docs/serving.md lists all of them.
"""

import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from byol_cli.output import emit, json_option
from byol_serving.errors import InvalidConfig

if TYPE_CHECKING:
    from byol_serving.config import ServeConfig

_PATH = click.Path(path_type=Path)


def _read_file(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Makes the file's settings the defaults of this call, before other options are looked at."""
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidConfig(f"config {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"config {path} is not TOML: {error}") from error
    settings = {name.replace("-", "_"): value for name, value in found.items()}
    known = {each.name for each in context.command.params} - {"config", "as_json"}
    if unknown := sorted(settings.keys() - known):
        raise InvalidConfig(
            f"config {path} has unknown settings {', '.join(unknown)}; they are named like the"
            " options, see byol serve --help"
        )
    context.default_map = {**(context.default_map or {}), **settings}
    return path


@click.command()
@click.option(
    "--config",
    type=_PATH,
    is_eager=True,
    expose_value=False,
    callback=_read_file,
    help="TOML file of settings, named like these options.",
)
@click.option("--bundle", type=_PATH, help="Encoder bundle to load.")
@click.option("--models", type=_PATH, help="Folder of more bundles, NAME/VERSION/.")
@click.option("--default-model", default="", help="Model of requests that name none.")
@click.option("--store", help="Folder of the collections, or milvus:ADDRESS.")
@click.option(
    "--index-gpu-memory",
    default=0,
    show_default=True,
    help="Bytes of GPU memory for copies of indexes; 0: none.",
)
@click.option("--backups", type=_PATH, help="Folder of their backups.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=50051, show_default=True, help="Port; 0 lets the system choose.")
@click.option(
    "--processes", default=1, show_default=True, help="Processes that answer on the port."
)
@click.option("--tls-cert", type=_PATH, help="Certificate chain, PEM; renewed files are taken up.")
@click.option("--tls-key", type=_PATH, help="Its private key, PEM.")
@click.option("--tls-client-ca", type=_PATH, help="Clients must show a certificate that it signed.")
@click.option("--tokens", type=_PATH, help="File of access tokens, see byol token.")
@click.option(
    "--insecure", is_flag=True, help="Go without TLS or tokens on an address that is not loopback."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Where the encoder runs.",
)
@click.option(
    "--cuda-graphs", is_flag=True, help="On CUDA, repeat batches as CUDA graphs where faster."
)
@click.option("--threads", default=0, show_default=True, help="Threads of one inference; 0: auto.")
@click.option(
    "--inference-workers", default=0, show_default=True, help="Inferences at a time; 0: auto."
)
@click.option(
    "--decode-workers",
    default=0,
    show_default=True,
    help="Threads that decode images; 0: one for each CPU.",
)
@click.option(
    "--collection-workers", default=4, show_default=True, help="Threads that wait for the store."
)
@click.option(
    "--search-workers", default=0, show_default=True, help="Threads that search; 0: by the CPUs."
)
@click.option(
    "--max-batch", default=0, show_default=True, help="Images in one inference; 0: by measurement."
)
@click.option(
    "--max-queued-images",
    default=4096,
    show_default=True,
    help="Images accepted and not yet answered; over it callers are told to retry.",
)
@click.option(
    "--max-queued-bytes",
    default=512 * 2**20,
    show_default=True,
    help="Their bytes, encoded and decoded; over it as above.",
)
@click.option(
    "--stream-window",
    default=8,
    show_default=True,
    help="Requests of one stream in flight; then its sender is held back.",
)
@click.option(
    "--max-image-bytes", default=32 * 2**20, show_default=True, help="Size of one encoded image."
)
@click.option(
    "--max-image-pixels",
    default=100_000_000,
    show_default=True,
    help="Width x height of one image.",
)
@click.option(
    "--max-image-seconds",
    default=10.0,
    show_default=True,
    help="CPU time that decoding one image may take; 0: any.",
)
@click.option(
    "--max-message-bytes",
    default=64 * 2**20,
    show_default=True,
    help="Size of one request or answer.",
)
@click.option("--drain-seconds", default=30.0, show_default=True, help="Time to finish at SIGTERM.")
@click.option(
    "--metrics-port",
    type=int,
    help="HTTP port of /metrics, /healthz and /readyz; without it there is none.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the lines on stderr.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged.",
)
@click.option("--log-calls", is_flag=True, help="Log a line for each call too.")
@click.option(
    "--slow-seconds",
    default=10.0,
    show_default=True,
    help="Log calls that took longer, and where their time went; 0: none.",
)
@click.option(
    "--otel-endpoint",
    default="",
    help="Send traces there, OTLP/HTTP, like http://127.0.0.1:4318/v1/traces.",
)
@json_option
def command(as_json: bool, **settings: Any) -> None:
    """Serve bundles and collections over gRPC, until SIGTERM or Ctrl-C.

    \b
    Example:  byol serve --bundle bundles/photos --store store
    Ask it:   byol search photo.jpg --collection photos
    """
    from byol_serving import logs
    from byol_serving.server import run_server

    config = build_config(settings)
    number = 0 if config.processes > 1 else None
    logs.configure(config.log_format, config.log_level, calls=config.log_calls, process=number)
    logs.say_settings(shown(click.get_current_context(), settings))

    def announce(address: str) -> None:
        emit({"serving": address, "bundle": config.bundle, "store": config.store}, as_json)

    if status := run_server(config, on_ready=announce):
        sys.exit(status)


def build_config(settings: Mapping[str, Any]) -> "ServeConfig":
    """The options' values as the server takes them; None means the default.

    Raises:
        InvalidConfig: a value out of range, or values that do not fit together.
    """
    from byol_serving.config import ServeConfig, TlsConfig
    from byol_serving.images import ImageLimits

    left = {name: value for name, value in settings.items() if value is not None}
    cert, key, ca = (left.pop(f"tls_{name}", None) for name in ("cert", "key", "client_ca"))
    if bool(cert) != bool(key) or (ca and not cert):
        raise InvalidConfig("TLS needs both --tls-cert and --tls-key")
    return ServeConfig(
        tls=TlsConfig(cert=cert, key=key, client_ca=ca) if cert else None,
        limits=ImageLimits(
            max_bytes=left.pop("max_image_bytes"),
            max_pixels=left.pop("max_image_pixels"),
            max_seconds=left.pop("max_image_seconds"),
        ),
        **left,
    )


def shown(context: click.Context, settings: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Each setting's value, passwords masked, and where it came from."""
    names = {
        ParameterSource.COMMANDLINE: "option",
        ParameterSource.ENVIRONMENT: "environment",
        ParameterSource.DEFAULT_MAP: "file",
    }
    return {
        name: (
            _masked(value) if isinstance(value, str) else value,
            names.get(context.get_parameter_source(name), "default"),  # type: ignore[arg-type]  # None is no key, and means default
        )
        for name, value in settings.items()
    }


def _masked(text: str) -> str:
    """An address without user, password and query, which may hold a key."""
    if "://" not in text:
        return text
    return re.sub(r"\?.*", "?***", re.sub(r"//[^/@]*@", "//***@", text))
