"""The command `resmem`: its commands, and how errors end it.

Exit codes: 0 all went well; 1 a finding (no gain, damage found) or a refusal of the disk; 2 usage; 3 a corrupt file;
4 a memory that another process is writing to; 130 interrupted.
"""

import difflib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from residual_memory._version import __version__
from residual_memory.cli import (
    asking,
    auditing,
    building,
    demo,
    doctor,
    exchanging,
    forgetting,
    keeping,
    measuring,
    planning,
    serving,
)
from residual_memory.cli.options import Interrupted
from residual_memory.cli.output import note, report
from residual_memory.cli.reporting import COMMAND_LINE
from residual_memory.errors import (
    BrokenPlugin,
    CorruptFile,
    DataNotFound,
    InvalidInput,
    MemoryLocked,
    MemoryNotFound,
    MissingExtra,
    ResidualMemoryError,
    ResidualMemoryWarning,
    UnknownId,
    UnsupportedFormat,
    cause_and_remedy,
)

FINDING, USAGE, CORRUPT, LOCKED, INTERRUPTED = 1, 2, 3, 4, 130

UsageError: Any = typer.BadParameter.__base__  # click's, which typer keeps in different places
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (CorruptFile, CORRUPT),
    (UnsupportedFormat, CORRUPT),
    (MemoryLocked, LOCKED),
    (InvalidInput, USAGE),
    (MissingExtra, USAGE),
    (BrokenPlugin, USAGE),
    (MemoryNotFound, USAGE),
    (DataNotFound, USAGE),
    (UsageError, USAGE),
    (Interrupted, INTERRUPTED),
)
_HELP = "{command} --help says what is expected"
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (CorruptFile, "resmem verify MEMORY lists what is damaged; restore it from a copy, or resmem salvage MEMORY TO"),
    (MemoryLocked, "wait until the other process is done, or stop it"),
    (MemoryNotFound, "name the directory of a memory, or make one: resmem build --help"),
    (UnknownId, "nothing was changed; name ids that the memory holds"),
    (InvalidInput, _HELP),
    (DataNotFound, _HELP),
    (UsageError, _HELP),
    (OSError, "see to the file or the disk, then run the command again"),
)


class Commands(TyperGroup):
    """The commands, with a question after a mistyped one."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            close = difflib.get_close_matches(cmd_name, known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"the commands are: {', '.join(known)}"
            raise InvalidInput(f"there is no command {cmd_name!r}; {hint}")
        return found


app = typer.Typer(
    name="resmem",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_PANELS = {
    "Start": (demo.demo,),
    "Make and measure": (building.build, measuring.tune, measuring.evaluate),
    "Use": (asking.predict, asking.explain, serving.serve),
    "Keep": (
        building.add,
        forgetting.forget,
        forgetting.compact,
        forgetting.inventory,
        keeping.index,
        keeping.verify,
        keeping.salvage,
        keeping.info,
    ),
    "In and out": (exchanging.export, exchanging.import_, exchanging.merge, exchanging.shrink),
    "Plan": (planning.estimate, measuring.bench, doctor.doctor),
}
_NAMES = {
    command: command.__name__.removesuffix("_")  # Python's own word: import
    for commands in _PANELS.values()
    for command in commands
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(_NAMES[_command], rich_help_panel=_panel)(_command)
_GROUPS = {"audit": ("Make and measure", "What a memory tells of the rows in it.", (auditing.privacy,))}
for _name, (_panel, _help, _inside) in _GROUPS.items():
    _group = typer.Typer(cls=Commands, help=_help)
    for _part in _inside:
        _group.command()(_part)
    app.add_typer(_group, name=_name, rich_help_panel=_panel)


@app.callback(invoke_without_command=True)
def resmem(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Give a trained model a memory of what it could not learn.

    Build a memory from the model's training data, tune it on held-out data, and predict better from then on, without
    training. Begin with: resmem demo
    """
    if version:
        typer.echo(f"resmem {__version__}")
        raise typer.Exit


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _never_fail_to_print()
    command = typer.main.get_command(app)
    COMMAND_LINE.set(tuple(arguments))
    with _warnings_as_notes():
        try:
            code = command.main(arguments or ["--help"], prog_name="resmem", standalone_mode=False)
            if code == INTERRUPTED:
                return _interrupted()
            return int(code or 0) if arguments else USAGE
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted()
        except ResidualMemoryError as error:
            return _failed(error, str(error), arguments)
        except UsageError as error:
            return _failed(error, error.format_message(), arguments)
        except OSError as error:
            return _failed(error, str(error), arguments)


def _failed(error: Exception, message: str, arguments: Sequence[str]) -> int:
    """Say the cause and the remedy, each on a line of its own."""
    cause, remedy = _parts(error, message)
    code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), FINDING)
    remedy = remedy.format(command=f"resmem {_named(arguments)}") if remedy == _HELP else remedy
    note(f"error: {cause}")
    if remedy:
        note(f"remedy: {remedy}")
    if "--json" in arguments:
        kind = type(error).__name__
        report({"error": {"type": kind, "cause": cause, "remedy": remedy, "exit_code": code}}, as_json=True)
    return code


def _named(arguments: Sequence[str]) -> str:
    """The command that a line names, with the group that it is in."""
    for place, argument in enumerate(arguments):
        if argument in _GROUPS:
            inside = {command.__name__ for command in _GROUPS[argument][2]} & {*arguments[place + 1 : place + 2]}
            return " ".join([argument, *inside])
        if argument in _NAMES.values():
            return argument
    return "COMMAND"


def _parts(error: Exception, message: str) -> tuple[str, str]:
    """The library's messages say "cause; remedy"; where one does not, its kind does."""
    cause, remedy = cause_and_remedy(error) if isinstance(error, ResidualMemoryError) else (message, "")
    default = next((text for kind, text in _REMEDIES if isinstance(error, kind)), "")
    return cause, default if isinstance(error, MemoryLocked) else remedy or default


def _interrupted() -> int:
    note("interrupted; run the same command again to go on")
    return INTERRUPTED


def _never_fail_to_print() -> None:
    """Where the terminal's encoding lacks a character, escape it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """The library's warnings as one line each; others as they are."""
    with warnings.catch_warnings():
        shown_before = warnings.showwarning

        def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if issubclass(category, ResidualMemoryWarning):
                note(f"warning: {message}")
            else:
                shown_before(message, category, *place, **more)

        warnings.simplefilter("always", ResidualMemoryWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
