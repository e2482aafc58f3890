"""The pages in docs/: their code runs, what they say it prints is what it prints, and Sphinx can build them.

A page is run as a reader would run it, in a process of its own: this file, called with the page's path.
"""

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import residual_memory as rm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# What a page's code imports beyond the core.
NEEDS = {
    "choosing": ("torch", "sklearn"),
    "when-not": ("sklearn",),
    "extending": ("sklearn",),
    "start-images": ("torch", "sklearn"),
    "start-tables": ("sklearn", "pandas"),
    "start-text": ("torch", "transformers"),
    "tables": ("sklearn",),
    "language": ("torch", "transformers"),
    "ray": ("torch",),
    "reports": ("matplotlib", "jinja2"),
    "serving": ("fastapi", "httpx"),
    "sharing": ("torch", "sklearn", "transformers", "mlflow"),
}
SPHINX = ("sphinx", "myst_parser", "furo")
FRAMEWORKS = ("faiss", "sklearn", "torch", "transformers")
BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,.]*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the line that it starts at."""

    kind: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(content):
        yield Block(found[1], found[2], content[: found.start(2)].count("\n"))


def missing(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def runs(page: Path) -> bool:
    return any(block.kind == "python" for block in blocks(page))


def run_page(page: Path) -> None:
    """Run a page's blocks in order, in one namespace; a text block is what the Python before it printed."""
    scope: dict[str, Any] = {"__name__": page.stem}
    printed: str | None = None
    for block in blocks(page):
        where = f"{page.name}, line {block.line + 1}"
        if block.kind == "text" and printed is not None:
            assert masked(printed) == masked(block.text), where
        printed = None
        if block.kind == "python" and block.text.lstrip().startswith(">>>"):
            run_session(block, page, scope)
        elif block.kind == "python":
            code = ast.increment_lineno(ast.parse(block.text), block.line)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(page), "exec"), scope)
            printed = out.getvalue()
        elif block.kind == "sh":
            printed = run_commands(block, where)


def run_session(block: Block, page: Path, scope: dict[str, Any]) -> None:
    """A block of >>> lines, as doctest runs it."""
    session = doctest.DocTestParser().get_doctest(block.text, scope, page.name, str(page), block.line)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(session, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    scope.update(session.globs)


def run_commands(block: Block, where: str) -> str | None:
    """The lines that call `resmem` or `curl`, and what curl printed; others, such as pip, are left alone."""
    from residual_memory.cli.main import main

    printed = None
    for line in block.text.splitlines():
        if line.startswith("resmem "):
            assert main(shlex.split(line)[1:]) == 0, f"{where}: {line}"
        elif line.startswith("curl "):
            ended = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60)
            assert ended.returncode == 0, f"{where}: {line}\n{ended.stderr}"
            printed = ended.stdout
    return printed


def masked(output: str) -> list[str]:
    """The lines with every number hidden, and runs of lines that differ in numbers alone as one."""
    lines = [NUMBER.sub("#", line).split() for line in output.strip().splitlines()]
    return [" ".join(line) for place, line in enumerate(lines) if place == 0 or line != lines[place - 1]]


def python(*arguments: str | Path, cwd: Path) -> None:
    """Another Python, and what it said where it fails."""
    ended = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if runs(page)])
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path) -> None:
    if absent := missing(NEEDS.get(page.stem, ())):
        pytest.skip(f"docs/{page.name} needs {' and '.join(absent)}")
    python(__file__, page, cwd=tmp_path)


def test_the_start_needs_numpy_alone(tmp_path: Path) -> None:
    python(__file__, DOCS / "start-arrays.md", *FRAMEWORKS, cwd=tmp_path)


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for tree in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in tree.split()}
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_the_readme_leads_to_every_page_and_to_nothing_that_is_not_there() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+)[)#]", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES} - {"docs/index.md"} <= linked
    assert [link for link in sorted(linked) if not (ROOT / link).exists()] == []


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"auto(?:class|function):: residual_memory\.(\w+)$", reference, re.MULTILINE))
    public = {name for name in rm.__all__ if not name.startswith("_") and not inspect.ismodule(getattr(rm, name))}
    assert public - named == set()


def names_of(app: Any) -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def test_the_command_page_lists_the_commands_that_there_are() -> None:
    from residual_memory.cli.main import app

    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[0]
    listed = re.findall(r"^\| `([\w ]+)` \|", table, re.MULTILINE)
    names = names_of(app) + [
        f"{group.name} {name}"
        for group in app.registered_groups
        if group.typer_instance
        for name in names_of(group.typer_instance)
    ]
    assert sorted(listed) == sorted(names)


@pytest.mark.skipif(
    bool(missing(SPHINX)), reason=f"{', '.join(missing(SPHINX))} missing: pip install 'residual-memory[docs]'"
)
def test_sphinx_builds_the_pages_without_a_warning(tmp_path: Path) -> None:
    if absent := missing(("torch", "transformers", "sklearn", "fastapi", "httpx", "mlflow")):
        pytest.skip(f"the reference imports {absent[0]}")
    options = ("-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees")
    python("-m", "sphinx", *options, DOCS, tmp_path / "html", cwd=ROOT)
    for page in PAGES:
        assert (tmp_path / "html" / f"{page.stem}.html").is_file()


if __name__ == "__main__":
    warnings.simplefilter("error")
    for hidden in sys.argv[2:]:
        sys.modules[hidden] = None  # type: ignore[assignment]  # as if it were not installed
    run_page(Path(sys.argv[1]))
