"""The whisper-steer command. One file per subcommand; torch, whisper and numpy are imported when a command
runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import WhisperSteerError
from .bake import bake, unbake
from .calibrate import calibrate
from .compare import compare
from .convert import convert
from .inspect import inspect
from .models import models
from .output import print_error
from .saes import saes
from .transcribe import transcribe

app = typer.Typer(
    help="Transcribes speech with Whisper, steered so that it does not write words nobody said.",
    epilog="Long options may be spelt with - or _ between their words (--output-dir, --output_dir).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: loading rich would triple the time --help takes
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 110,
    },
)
app.command()(transcribe)
app.command()(compare)
app.command()(convert)
app.command()(bake)
app.command()(unbake)
app.command()(models)
app.command()(inspect)
app.command()(calibrate)
app.add_typer(saes, name="saes")

# typer >= 0.26 carries its own copy of click, earlier ones use the package: this is the right class in both
_ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"whisper-steer {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Transcribes speech with Whisper, steered so that it does not write words nobody said."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.

    Every foreseen error is one line on stderr.
    """
    _log_to_stderr()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=args, prog_name="whisper-steer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _ClickException as error:
        return _usage_error(error)
    except WhisperSteerError as error:
        print_error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _usage_error(error: BaseException) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "whisper-steer"
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 2
    print_error(f"{message.rstrip('.')} (see {path} --help)")
    return int(error.exit_code)  # type: ignore[attr-defined]


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Looks sys.stderr up at every record, so that redirecting it works."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_OneLine())

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):  # above a progress bar, not into it
            super().emit(record)


def _log_to_stderr() -> None:
    """Warnings of this package, one line each; once per process."""
    logger = logging.getLogger("whisper_steer")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
