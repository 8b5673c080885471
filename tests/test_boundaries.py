"""Which package may import what: docs/architecture.md, "Boundaries", as a test."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "byol_training": ROOT / "training",
    "byol_serving": ROOT / "serving",
    "byol_cli": ROOT / "serving",
}
# Who alone may import a library: modules, as patterns.
OWNERS = {
    "grpc": (
        "byol_serving.rpc.*",
        "byol_serving.server*",
        "byol_serving.client*",
        "byol_serving.pb.*",
    ),
    # Not public: a newer grpcio may change it.
    "grpc._cython": (
        "byol_serving.rpc.async_server",
        "byol_serving.rpc.completions",
        "byol_serving.rpc.server_call",
    ),
    "faiss": ("byol_serving.collections.faiss_library", "byol_cli.doctor"),
    "pymilvus": ("byol_serving.collections.milvus*",),
    "numba": (
        "byol_serving.collections.byte_products",
        "byol_serving.collections.compiling",
        "byol_serving.collections.graph_walk",
        "byol_serving.collections.units",
    ),
    # quantize: ONNX Runtime's own quantiser is the only maintained one for its graphs.
    "onnxruntime": (
        "byol_serving.encoder",
        "byol_serving.cuda_graphs",
        "byol_serving.padded_batches",
        "byol_training.quantize",
        "byol_cli.doctor",
    ),
    "torch": ("byol_training.*", "byol_cli.doctor", "byol_cli.demo_run"),
    "torchvision": ("byol_training.*", "byol_cli.doctor"),
}
TRAINING_MAY_USE = {
    "byol_serving.bundle",
    "byol_serving.encoder",
    "byol_serving.errors",
    "byol_serving.images",
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours: its dotted name and its file."""
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it, functions included; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found.update(name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found.add(module)
                found.update(f"{module}.{name.name}" for name in names)
            case ast.ImportFrom():
                raise AssertionError(f"{path}: relative import; write the package's name")
    return found


def test_the_rules_speak_of_modules_that_exist() -> None:
    patterns = [pattern for owners in OWNERS.values() for pattern in owners]
    unused = [p for p in patterns if not any(fnmatch(module, p) for module in MODULES)]
    assert not unused
    assert set(MODULES) >= TRAINING_MAY_USE


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_only_by_its_owners(library: str) -> None:
    users = [
        module
        for module, path in MODULES.items()
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path))
    ]
    assert users
    strangers = [m for m in users if not any(fnmatch(m, owner) for owner in OWNERS[library])]
    assert not strangers


def test_serving_knows_neither_training_nor_the_command_line() -> None:
    for module, path in MODULES.items():
        if module.startswith("byol_serving"):
            packages = {name.split(".")[0] for name in imports(path)}
            assert not packages & {"byol_training", "byol_cli"}, module


def test_training_meets_serving_only_in_the_bundle() -> None:
    used = {
        name
        for module, path in MODULES.items()
        if module.startswith("byol_training")
        for name in imports(path) & set(MODULES)
        if name.startswith("byol_serving.")
    }
    assert used <= TRAINING_MAY_USE


def test_collections_know_no_transport() -> None:
    known = ("byol_serving.collections", "byol_serving.errors", "byol_serving.cuda_threads")
    for module, path in MODULES.items():
        if module.startswith("byol_serving.collections"):
            strangers = {
                name
                for name in imports(path)
                if name.startswith("byol_serving.") and not name.startswith(known)
            }
            assert not strangers, module
