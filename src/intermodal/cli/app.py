"""The command line: its verbs and how its errors are said. Torch is imported inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

from . import chat, checkpoints, encoders, inspect, train
from .data import data

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train, evaluate, run and exchange multimodal models: CLIP, SigLIP, LLaVA, Qwen-VL.",
)
VERBS = {
    "train": train.train,
    "eval": encoders.evaluate,
    "embed": encoders.embed,
    "search": encoders.search,
    "chat": chat.chat,
    "generate": chat.generate,
    "inspect": inspect.inspect,
    "convert": checkpoints.convert,
    "stitch": checkpoints.stitch,
    "compare": train.compare,
    "demo": train.demo,
    "demo-native": train.demo_native,
}
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(data, name="data")


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every verb; `run` reads --debug itself, before parsing."""


def run(arguments: list[str]) -> NoReturn:
    """Run a verb; an error is one line on stderr and exit code 1 (2 for a wrong command), with --debug a traceback."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments or ["--help"], standalone_mode=False, prog_name="intermodal")
    except Exception as error:
        if debug:
            raise
        line = _line(error)
        if line:
            typer.echo(" ".join(line.split("\n")), err=True)
        sys.exit(130 if type(error).__name__ == "Stopped" else getattr(error, "exit_code", 1))
    if code == 130:  # so typer answers a Ctrl-C that no verb has
        typer.echo("interrupted", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _line(error: Any) -> str:
    """What is said of an error: what the user can mend, else that it is a fault of this program.

    A ValueError of torch's or numpy's is no word to the user: what this library has against an input is an `IntermodalError`.
    """
    from ..errors import IntermodalError

    if hasattr(error, "format_message"):  # typer's own: an option or verb that does not exist, a value that does not fit
        return _usage(error)
    if isinstance(error, IntermodalError | OSError):  # an OSError is about a path, a disk or a network, which are the user's
        return f"error: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return f"error: out of memory: {error}"
    said = ": ".join(filter(None, (type(error).__name__, str(error))))
    return f"internal error: {said} (a fault of intermodal: please report it, with what --debug shows)"


def _usage(error: Any) -> str:
    """A wrong command line, and which help to read; nothing where the help has been shown instead (`intermodal data`)."""
    if not error.format_message():
        return ""
    where = f" ({error.ctx.command_path} --help shows what it takes)" if getattr(error, "ctx", None) else ""
    return f"error: {error.format_message().rstrip('.')}{where}"
