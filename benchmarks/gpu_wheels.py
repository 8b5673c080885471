"""Brings wheels to a GPU machine without network, in parts that a transfer takes.

    python benchmarks/gpu_wheels.py fetch --into parts --part-mb 60     # where there is a network
    python benchmarks/gpu_wheels.py install parts                       # there

`fetch` downloads the wheels named in WHEELS for Python 3.12 on x86-64 Linux, without their
dependencies: the machine is taken to have torch with its CUDA 13 libraries, torchvision, grpcio and
onnx. Other packages, or less, with --packages. Files larger than a part are split, all are listed
with their SHA-256 in parts/wheels.json; `install` joins them, verifies each, and gives them to pip.
`split` and `join` do the same for a folder of any files. Only the standard library is used.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WHEELS = (
    # Serving and FAISS, for CUDA 13.
    *("onnxruntime-gpu==1.31.1", "faiss-gpu-cuvs==1.15.1"),
    *("libcuvs-cu13==26.6.*", "libraft-cu13==26.6.*", "librmm-cu13==26.6.*", "rapids-logger"),
    # What our packages import beside them.
    *("click", "cuda-bindings==13.*", "cuda-pathfinder", "flatbuffers", "llvmlite", "numba"),
    *("grpcio-health-checking<1.79", "grpcio-reflection<1.79"),
    *("nvidia-ml-py", "onnx-ir", "onnxscript", "prometheus-client", "rich", "safetensors"),
    *("simplejpeg", "uvloop"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
LIST = "wheels.json"
_BLOCK = 1 << 20


def main() -> None:
    """Does what the first word says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action, about in (
        ("fetch", "download and split"),
        ("split", "split the files of a folder"),
        ("join", "join and verify"),
        ("install", "join, verify and install"),
    ):
        one = actions.add_parser(action, help=about)
        if action != "fetch":
            one.add_argument("source", type=Path, help="folder of files, or of parts")
        if action != "install":
            one.add_argument("--into", type=Path, required=True, help="folder to make")
        if action in ("fetch", "split"):
            one.add_argument("--part-mb", type=float, default=60.0, help="largest part, MB")
        if action == "fetch":
            one.add_argument("--packages", nargs="+", default=WHEELS, help="in place of WHEELS")
    given = parser.parse_args()
    match given.action:
        case "fetch":
            with tempfile.TemporaryDirectory() as scratch:
                fetch(given.packages, Path(scratch))
                split(Path(scratch), given.into, int(given.part_mb * 1e6))
        case "split":
            split(given.source, given.into, int(given.part_mb * 1e6))
        case "join":
            join(given.source, given.into)
        case "install":
            with tempfile.TemporaryDirectory() as scratch:
                install(join(given.source, Path(scratch)))


def fetch(packages: list[str], into: Path) -> None:
    """The wheels of Python 3.12 on x86-64 Linux, without dependencies."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    how = ["--only-binary=:all:", "--no-deps", "--python-version", "3.12", *platforms]
    pip("download", *how, "--dest", str(into), *packages)


def install(wheels: list[Path]) -> None:
    """By pip, which looks nowhere else."""
    pip("install", "--no-index", "--no-deps", *map(str, wheels))


def pip(*words: str) -> None:
    """Runs it; ends the script where it fails."""
    code = subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode
    if code:
        raise SystemExit(f"pip {words[0]} failed with exit code {code}; see its messages above")


def split(source: Path, into: Path, limit: int) -> None:
    """Files in parts of at most `limit` bytes, and their list with checksums."""
    into.mkdir(parents=True)
    files = []
    for path in sorted(each for each in source.iterdir() if each.is_file()):
        names: list[str] = []
        with path.open("rb") as file:
            while True:
                name = f"{path.name}.{len(names):03}"
                written = copy(file, into / name, limit)
                if written == 0 and names:
                    (into / name).unlink()
                    break
                names.append(name)
                if written < limit:
                    break
        files.append({"name": path.name, "sha256": sha256(path), "parts": names})
    (into / LIST).write_text(json.dumps(files, indent=1) + "\n")
    parts = sum(len(each["parts"]) for each in files)
    print(f"{len(files)} files in {parts} parts, listed in {into / LIST}")


def copy(file: Any, to: Path, limit: int) -> int:
    """At most `limit` of the next bytes of a file; how many there were."""
    written = 0
    with to.open("wb") as part:
        while block := file.read(min(_BLOCK, limit - written)):
            written += part.write(block)
    return written


def join(source: Path, into: Path) -> list[Path]:
    """The files again; ends the script where a part is missing or a checksum is another."""
    into.mkdir(parents=True, exist_ok=True)
    try:
        files = json.loads((source / LIST).read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{source / LIST} cannot be read ({error}); transfer it again") from error
    joined = []
    for each in files:
        path = into / each["name"]
        if lost := [name for name in each["parts"] if not (source / name).is_file()]:
            raise SystemExit(f"{source / lost[0]} is missing; transfer it again")
        with path.open("wb") as whole:
            for name in each["parts"]:
                with (source / name).open("rb") as part:
                    while block := part.read(_BLOCK):
                        whole.write(block)
        if (found := sha256(path)) != each["sha256"]:
            path.unlink()
            raise SystemExit(
                f"{path.name} has sha256 {found[:12]}, not {each['sha256'][:12]};"
                f" transfer its {len(each['parts'])} parts again"
            )
        joined.append(path)
    print(f"{len(joined)} files verified")
    return joined


def sha256(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
