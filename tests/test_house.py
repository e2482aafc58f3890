"""Who may know whom, and what an import costs."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import residual_memory
from tests.problems import in_plain_python

SOURCE = Path(residual_memory.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FRAMEWORKS = ["torch", "transformers", "sklearn", "faiss", "ray", "scann", "scipy"]

# Lowest first: a room may import itself and the rooms of the rows above it, less what FORBIDDEN says.
LAYERS = [
    {"errors", "types", "_version", "progress", "machine", "display"},
    {"validation", "cluster"},
    {"kernels", "residuals", "metrics", "gate", "sparse", "windows"},
    {"memory", "indexes"},
    {"correction", "metric_learning"},
    {"explanation", "evaluation", "language", "planning"},
    {"tuning", "privacy"},
    {"models", "theory", "figures", "exchange", "client", "surveying", "examples"},
    {"reports"},
    {"demo", "selftest", "shrinking", "testing"},
    {"server"},
    {"cli"},
]
CORE = set().union(*LAYERS[:7]) - {"indexes", "progress", "cluster"}
ROOMS = set().union(*LAYERS)
MINIMISERS = {"gate", "language", "metric_learning"}
FORBIDDEN = {
    "indexes": ROOMS - {"errors", "types", "machine", "cluster", "indexes"},
    "memory": {"kernels", "metrics"},
    "exchange": ROOMS - {"errors", "types", "_version", "progress", "validation", "memory", "exchange"},
    "figures": ROOMS - {"errors", "display", "figures"},
}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; names from the package itself as room paths."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            if node.module == "residual_memory":
                yield from (f"residual_memory.{alias.name}" for alias in node.names)
            else:
                yield node.module


def rooms_imported_by(file: Path) -> set[str]:
    paths = (name.split(".") for name in imports_of(file))
    return {path[1] for path in paths if path[0] == "residual_memory" and len(path) > 1} & ROOMS


def allowed(room: str) -> set[str]:
    place = next(place for place, layer in enumerate(LAYERS) if room in layer)
    return (set().union(*LAYERS[:place]) - FORBIDDEN.get(room, set())) | {room}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_arrows_go_one_way(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":
        return
    assert room in ROOMS, f"{room} has no place among the rooms yet"
    assert rooms_imported_by(file) <= allowed(room)


def test_the_arrows_are_looked_at() -> None:
    """Without imports to look at the test above would show nothing."""
    assert rooms_imported_by(SOURCE / "correction.py") >= {"memory", "indexes", "kernels", "validation"}
    assert "correction" not in allowed("memory")
    assert "memory" not in allowed("indexes")


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) in CORE], ids=lambda file: file.name)
def test_the_core_needs_numpy_and_jaxtyping_alone(file: Path) -> None:
    """But for the fits of a gate and of a metric, which minimise a function: scipy comes with the package."""
    outside = {name.split(".")[0] for name in imports_of(file)} - set(sys.stdlib_module_names) - {"residual_memory"}
    assert outside <= {"numpy", "jaxtyping"} | ({"scipy"} if room_of(file) in MINIMISERS else set())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_imports_recipes_or_tests(file: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(file)} & {"experiments", "benchmarks", "tests"}


@pytest.mark.parametrize(
    "file", [file for file in FILES if room_of(file) in CORE | {"exchange"}], ids=lambda file: file.name
)
def test_nothing_stored_is_run(file: Path) -> None:
    assert not set(imports_of(file)) & {"pickle", "marshal", "shelve"}


LOADED = """
import sys
import residual_memory
{use}
print(*sorted(set({names!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "use",
    [
        "",
        "dir(residual_memory)",
        "residual_memory.Memory, residual_memory.ResidualKNN, residual_memory.tune, residual_memory.explain",
        "residual_memory.Memory.create(dim=1, n_outputs=2)",
    ],
)
def test_importing_the_package_imports_no_framework(use: str) -> None:
    assert in_plain_python(LOADED.format(use=use, names=FRAMEWORKS)) == "\n"


def test_importing_the_package_imports_not_even_numpy() -> None:
    assert in_plain_python(LOADED.format(use="", names=["numpy", "jaxtyping", "typer"])) == "\n"


@pytest.mark.parametrize("name", residual_memory.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(residual_memory, name) is not None
    assert name in dir(residual_memory)


def test_no_public_name_is_a_rooms_too() -> None:
    """Whoever imports a room makes it an attribute of the package, and would hide the function of that name."""
    assert set(residual_memory.__all__) & ROOMS == {"errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Memry'"):
        _ = residual_memory.Memry


def test_every_error_has_the_root_and_can_be_told_from_others() -> None:
    errors = residual_memory.errors
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(classes) >= 14
    for error in classes:
        assert issubclass(error, errors.ResidualMemoryError | errors.ResidualMemoryWarning)
        assert error.__name__ in (errors.__doc__ or ""), "the tree on the page is whole"
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.MissingExtra, ImportError)
    assert issubclass(errors.MemoryNotFound, FileNotFoundError)
    assert issubclass(errors.StorageFailure, OSError)
