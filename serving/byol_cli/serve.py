"""`byol serve`: the gRPC server."""

from pathlib import Path
from typing import Any

import click

from byol_cli.output import emit, json_option
from byol_serving.errors import InvalidConfig


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Encoder bundle to load.")
@click.option("--store", help="Folder of the collections, or milvus:ADDRESS.")
@click.option("--backups", type=click.Path(path_type=Path), help="Folder of their backups.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=50051, show_default=True, help="Port; 0 lets the system choose.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Where the encoder runs.",
)
@click.option("--threads", default=0, show_default=True, help="Threads of one inference; 0: auto.")
@click.option(
    "--inference-workers", default=0, show_default=True, help="Inferences at a time; 0: auto."
)
@click.option(
    "--max-batch", default=0, show_default=True, help="Images in one inference; 0: by measurement."
)
@click.option("--drain-seconds", default=30.0, show_default=True, help="Time to finish at SIGTERM.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key, PEM.")
@click.option(
    "--tls-client-ca", type=click.Path(path_type=Path), help="Ask clients for one of its."
)
@json_option
def command(
    as_json: bool,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    **settings: Any,
) -> None:
    """Serve a bundle and its collections over gRPC, until SIGTERM or Ctrl-C.

    \b
    Example:  byol serve --bundle bundles/photos --store store
    Ask it:   byol search photo.jpg --collection photos
    """
    from byol_serving.config import ServeConfig, TlsConfig
    from byol_serving.server import run_server

    tls = None
    if tls_cert and tls_key:
        tls = TlsConfig(cert=tls_cert, key=tls_key, client_ca=tls_client_ca)
    elif tls_cert or tls_key or tls_client_ca:
        raise InvalidConfig("TLS needs both --tls-cert and --tls-key")
    config = ServeConfig(tls=tls, **settings)

    def announce(address: str) -> None:
        emit({"serving": address, "bundle": config.bundle, "store": config.store}, as_json)

    run_server(config, on_ready=announce)
