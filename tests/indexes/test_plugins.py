"""Engines of other packages: found by name, checked, and never in the way of our own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import BrokenPlugin, InvalidInput
from residual_memory.indexes import registry
from residual_memory.indexes.registry import check_index, engine_named, engine_names, parse_spec
from tests.cli.workshop import resmem
from tests.problems import classification, in_plain_python, knn_of, memory_of
from tests.test_docs import DOCS, blocks


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})


def of_the_page() -> dict[str, Any]:
    """The classes of docs/plugins.md: its first block of Python, and the one with its battery."""
    scope: dict[str, Any] = {"__name__": "plugins"}
    for block in blocks(DOCS / "plugins.md"):
        if block.kind == "python" and "class " in block.text:
            exec(block.text, scope)
    return scope


PAGE = of_the_page()
BATTERY: Any = PAGE["TestProjected"]


class TestTheIndexOfThePage(BATTERY):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def named(self, names: None) -> None:
        rm.register_index("projected", PAGE["ProjectedEngine"])


def test_a_registered_engine_searches_and_is_named_among_the_others() -> None:
    with pytest.raises(InvalidInput, match=r"expected to begin with one of auto, exact, faiss, ray, scann"):
        parse_spec("projected:3")
    rm.register_index("projected", PAGE["ProjectedEngine"])
    assert engine_names()[:5] == ["auto", "exact", "faiss", "ray", "scann"]
    assert "projected" in engine_names()
    problem = classification(n=200)
    knn = knn_of(memory_of(problem), index="projected:5")
    assert knn.description == "projected 5"
    assert (knn.neighbors(problem.keys[:20]).ids[:, 0] == np.arange(20)).all()
    with pytest.raises(InvalidInput, match="did you mean 'projected'"):
        parse_spec("projectd:3")


@pytest.mark.parametrize("name", ["exact", "auto", "faiss", "", "a:b", "what?", "1st", "a b"])
def test_a_name_that_is_ours_or_cannot_be_read_in_a_spec_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="expected letters, digits"):
        rm.register_index(name, PAGE["ProjectedEngine"])


NO_ENGINE = """
import residual_memory as rm
from residual_memory.indexes.base import Engine, Index
for kind in (Index, Engine, Engine.build, "others:Other"):
    try:
        rm.register_index("mine", kind)
    except rm.errors.InvalidInput as error:
        print("expected a class that implements residual_memory.indexes.base.Engine" in str(error))
"""


def test_only_an_engine_can_be_registered() -> None:
    assert in_plain_python(NO_ENGINE) == "True\n" * 4


# ---------------------------------------------------------------------- entry points


WORKING = """
from residual_memory.indexes.exact import ExactEngine

class Other(ExactEngine):
    pass

class NoEngine:
    pass
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of installed packages, on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


def install(site: Path, package: str, points: dict[str, str], code: str = WORKING) -> None:
    """A package as an installer leaves it."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[residual_memory.indexes]", *lines, ""]))
    (site / f"{package}.py").write_text(code)


def test_an_installed_engine_is_found_by_its_name(site: Path) -> None:
    install(site, "others", {"other": "others:Other"})
    assert engine_names()[-1] == "other"
    assert type(engine_named("other")).__name__ == "Other"
    check_index("other:numpy", 3)
    problem = classification()
    assert knn_of(memory_of(problem), index="other:numpy").description == "exact (numpy)"


def test_an_installed_engine_is_not_imported_before_it_is_named(site: Path) -> None:
    install(site, "others", {"other": "others:Other"}, "raise RuntimeError('imported')")
    knn_of(memory_of(classification()), index="exact:numpy")
    parse_spec("other")
    assert "others" not in sys.modules


def test_our_own_names_cannot_be_taken(site: Path) -> None:
    install(site, "others", {"exact": "others:NoEngine", "auto": "others:NoEngine"})
    assert engine_names().count("exact") == 1
    assert knn_of(memory_of(classification()), index="exact:numpy").description == "exact (numpy)"
    check_index("auto", 3)


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        (
            "others:Other",
            "raise RuntimeError('no licence')",
            r"others:Other of others, cannot be imported: .*no licence",
        ),
        ("others:Missing", WORKING, "cannot be imported: AttributeError"),
        ("nowhere:Other", WORKING, "cannot be imported: ModuleNotFoundError"),
        ("others:NoEngine", WORKING, "expected a class that implements residual_memory.indexes.base.Engine"),
        ("others", WORKING, "is no engine"),
    ],
)
def test_an_engine_that_cannot_be_used_says_whose_it_is(site: Path, value: str, code: str, message: str) -> None:
    install(site, "others", {"other": value}, code)
    with pytest.raises(BrokenPlugin, match=message):
        check_index("other", 3)
    check_index("exact", 3)


def test_half_an_engine_is_none(site: Path) -> None:
    code = "from residual_memory.indexes.base import Engine\nclass Half(Engine):\n    pass\n"
    install(site, "others", {"other": "others:Half"}, code)
    with pytest.raises(BrokenPlugin, match="is no engine"):
        check_index("other", 3)


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "others", {"other": "others:Other"})
    install(site, "more", {"other": "more:Other"})
    with pytest.raises(BrokenPlugin, match="more:Other of more and others:Other of others; keep one"):
        check_index("other", 3)


def test_the_command_line_says_what_is_broken(site: Path) -> None:
    install(site, "others", {"other": "nowhere:Other"})
    ran = resmem("estimate", "--rows", 10, "--dim", 2, "--outputs", 2, "--index", "other")
    assert ran.code == 2
    assert ran.err.startswith("error: index engine 'other', nowhere:Other of others, cannot be imported")


def test_a_registered_engine_comes_before_an_installed_one(site: Path) -> None:
    install(site, "others", {"other": "nowhere:Other"})
    rm.register_index("other", PAGE["ProjectedEngine"])
    assert isinstance(engine_named("other"), PAGE["ProjectedEngine"])
