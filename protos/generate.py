"""Generates serving/byol_serving/pb from protos/ (`--check`: fails if it is not up to date).

protoc maps the virtual folder byol_serving/pb to protos/, so that generated modules import each
other by the package's real name and need no patching.
"""

import filecmp
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
TARGET = HERE.parent / "serving" / "byol_serving" / "pb"
PACKAGE = "byol_serving/pb"


def generate(root: Path) -> None:
    """Writes the modules under root/byol_serving/pb; raises SystemExit if protoc fails."""
    (root / PACKAGE).mkdir(parents=True, exist_ok=True)
    protos = sorted(f"{PACKAGE}/{p.relative_to(HERE).as_posix()}" for p in HERE.rglob("*.proto"))
    google = importlib.resources.files("grpc_tools") / "_proto"
    outs = [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{PACKAGE}={HERE}", f"-I{google}", *outs, *protos]) != 0:
        raise SystemExit("protoc failed")
    for folder in [root / PACKAGE, *(p for p in (root / PACKAGE).rglob("*") if p.is_dir())]:
        (folder / "__init__.py").touch()


def stale(fresh: Path) -> list[str]:
    """Generated files that differ between `fresh` and the tree, or stand in only one of them."""
    names = {
        path.relative_to(base).as_posix()
        for base in (fresh, TARGET)
        for path in base.rglob("*.py*")
        if path.suffix in {".py", ".pyi"}
    }
    return sorted(
        name
        for name in names
        if not (fresh / name).exists()
        or not (TARGET / name).exists()
        or not filecmp.cmp(fresh / name, TARGET / name, shallow=False)
    )


def main() -> None:
    if "--check" not in sys.argv:
        generate(TARGET.parents[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        if names := stale(Path(scratch) / PACKAGE):
            raise SystemExit(f"generated code is out of date ({', '.join(names)}): run make protos")


if __name__ == "__main__":
    main()
