"""Settings of the server: one frozen dataclass, checked once, before anything is loaded."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from byol_serving.errors import InvalidConfig
from byol_serving.images import ImageLimits


def available_cpus() -> int:
    """CPUs that this process may run on (which a container may have narrowed)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """Encryption, and with `client_ca` also who may connect. All files are PEM."""

    cert: Path
    """The server's certificate chain."""
    key: Path
    """Its private key."""
    client_ca: Path | None = None
    """If given, clients must show a certificate that this authority signed (mutual TLS)."""

    def __post_init__(self) -> None:
        """Refuses files that cannot be read."""
        for name, path in (("cert", self.cert), ("key", self.key), ("client_ca", self.client_ca)):
            if path is not None and not path.is_file():
                raise InvalidConfig(f"tls {name} {path} is not a file; give the path of a PEM file")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `byol serve` can be told. Raises InvalidConfig for values out of range."""

    bundle: Path | None = None
    """Encoder bundle to load; without one the server answers only for vectors made elsewhere."""
    models: Path | None = None
    """Folder of more bundles, NAME/VERSION/: all are loaded, of each model the newest is in use."""
    default_model: str = ""
    """Model of requests that name none; empty: the bundle's, or the only one of the folder."""
    store: Path | str | None = None
    """Folder of the collections, or `milvus:` and an address (see `collections.opening`); without
    one the server only embeds."""
    index_gpu_memory: int = 0
    """Bytes of GPU memory that copies of a local store's indexes may take; 0: none are made."""
    backups: Path | None = None
    """Folder of backups; without one Backup and Restore are refused."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 50051
    """Port to listen on; 0 lets the system choose."""
    processes: int = 1
    """That answer on the port, each with encoders of its own; connections are spread over them."""
    tls: TlsConfig | None = None
    """Plain text if absent."""
    tokens: Path | None = None
    """File of access tokens (see `byol token`); without it who can connect may do anything."""
    insecure: bool = False
    """Serve without TLS or tokens on an address that is not loopback."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda or tensorrt."""
    cuda_graphs: bool = False
    """On CUDA, record batches as CUDA graphs where that makes them faster."""
    threads: int = 0
    """ONNX Runtime threads for one inference; 0 lets the encoder choose."""
    inference_workers: int = 0
    """Batches that may be in the encoder at the same time; 0 lets the encoder choose."""
    decode_workers: int = 0
    """Threads that decode images; 0: one for each CPU, divided among the processes."""
    collection_workers: int = 4
    """Threads that wait for the store's disk and index."""
    search_workers: int = 0
    """Threads that search; 0: one for each CPU, or 16 where the store is on another server."""
    max_batch: int = 0
    """Images in one inference; a larger request is split. 0: what a measurement at the start says
    pays, 64 at most."""
    max_queued_images: int = 4096
    """Images accepted and not yet answered; over it callers are told to retry."""
    max_queued_bytes: int = 512 * 2**20
    """Bytes of accepted images, encoded and decoded, not yet answered; over it as above."""
    stream_window: int = 8
    """Requests of one stream in flight; then its sender is held back."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What one image may be."""
    max_message_bytes: int = 64 * 2**20
    """Size of one request or response; gRPC answers RESOURCE_EXHAUSTED over it."""
    drain_seconds: float = 30.0
    """After SIGTERM, how long accepted requests may take before they are cut off."""
    metrics_port: int | None = None
    """HTTP port of /metrics, /healthz and /readyz; None: none, 0 lets the system choose."""
    log_format: str = "text"
    """Of the lines on stderr: text or json."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_calls: bool = False
    """Also a line for each call."""
    slow_seconds: float = 10.0
    """Calls that took longer are logged with where their time went; 0: none."""
    otel_endpoint: str = ""
    """OTLP/HTTP endpoint that spans are sent to; empty: no tracing."""

    def __post_init__(self) -> None:
        """Checks every limit, naming the value, the limit and the remedy."""
        if self.bundle is None and self.models is None and self.store is None:
            raise InvalidConfig("neither bundle nor store: give --bundle, --models or --store")
        for name, low, high in (
            ("index_gpu_memory", 0, 2**50),
            ("port", 0, 65535),
            ("processes", 1, 64),
            ("threads", 0, 1024),
            ("inference_workers", 0, 64),
            ("decode_workers", 0, 1024),
            ("collection_workers", 1, 256),
            ("search_workers", 0, 1024),
            ("max_batch", 0, 65536),
            ("max_queued_images", 1, 10**9),
            ("max_queued_bytes", 2**20, 2**50),
            ("stream_window", 1, 1024),
            ("max_message_bytes", 2**10, 2**31 - 1),
            ("drain_seconds", 0, 86400),
            ("metrics_port", 0, 65535),
            ("slow_seconds", 0, 86400),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidConfig(f"{name} {value} is outside {low}..{high}")
        for name, choices in (
            ("device", ("auto", "cpu", "cuda", "tensorrt")),
            ("log_format", ("text", "json")),
            ("log_level", ("debug", "info", "warning", "error")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise InvalidConfig(f"{name} {value!r} is none of {', '.join(choices)}")
        if not self.host:
            raise InvalidConfig("host is empty; give an address such as 127.0.0.1 or 0.0.0.0")
        if self.open_by and not self.insecure:
            raise InvalidConfig(
                f"host {self.host} is not loopback and the server has {' and '.join(self.open_by)};"
                " give --tls-cert, --tls-key and --tokens, or say --insecure"
            )

    @property
    def cores(self) -> int:
        """CPUs that are each process's part."""
        return max(1, available_cpus() // self.processes)

    @property
    def open_by(self) -> tuple[str, ...]:
        """What an address that is not loopback should have, and this configuration has not."""
        if is_loopback(self.host):
            return ()
        known = self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)
        return (
            *(() if self.tls is not None else ("no TLS",)),
            *(() if known else ("neither tokens nor client certificates",)),
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
