"""What every command stands on: one answer, exit codes, errors in one sentence.

Every command fills one answer; `--json` prints it as one document at the end, also when the command failed or was
interrupted. Heavy imports are inside functions, so that `diffclass --help` answers at once.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from diffclass import __version__ as VERSION

ROOT = Path(__file__).resolve().parents[3]
OK = 0
PROBLEM = 1
BAD_INPUT = 2
INTERRUPTED = 130
UsageError = typer.BadParameter.__base__  # typer does not export it
# what the library says in one sentence
FAILURES = (
    ValueError,
    TypeError,
    ArithmeticError,
    OSError,
    ImportError,
)
EXIT_CODES = (
    "Exit codes: 0 all is well, 1 a problem was found, 2 the input was bad, 130 interrupted."
)


def is_first() -> bool:
    """Whether this is the process that speaks, if several do the same work."""
    return os.environ.get("RANK", "0") == "0"


def shown(run, what: str, total: int | None = None, unit: str = "picture"):
    """The same items behind a progress bar: (correct, seen) of `total` pictures, or (done, total)."""
    from tqdm import tqdm

    with (
        contextlib.closing(run),
        tqdm(desc=what, unit=unit, total=total, file=sys.stderr, disable=not is_first()) as bar,
    ):
        for first, second in run:
            if total is None:
                bar.total = second
                bar.update(first - bar.n)
            else:
                bar.set_postfix_str(f"{first / second:.1%} correct")
                bar.update(second - bar.n)
            yield first, second


@dataclass
class Answer:
    """The answer of a command so far, and whether it is wanted as JSON."""

    json: bool = False
    content: dict = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a line for people, at once; with --json there is only the document at the end."""
        if not self.json and is_first():
            print(text, flush=True)

    def fail(self, sentence: str) -> None:
        """One sentence on stderr, and in the document."""
        print(f"diffclass: {sentence}", file=sys.stderr, flush=True)
        self.content["error"] = sentence

    def finish(self) -> None:
        """Print the document, if it is wanted and there is anything in it."""
        if self.json and self.content and is_first():
            print(json.dumps(self.content, indent=2, ensure_ascii=False, allow_nan=False))


def sentence_of(error: Exception) -> str:
    """What went wrong, on one line; the operating system's own errors name the file first."""
    system = isinstance(error, OSError) and error.filename and error.strerror
    text = f"{error.filename}: {error.strerror}" if system else str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if text.endswith("?") else text.rstrip(".") + "."


class _Commands(typer.core.TyperGroup):
    """Turns what the library raises into one sentence and an exit code, and prints the JSON document once."""

    def make_context(self, info_name, args, parent=None, **extra):
        """--json is looked up before anything is parsed: it also holds for arguments that cannot be understood."""
        answer = Answer(json="--json" in (args[: args.index("--")] if "--" in args else args))
        with self._usage_errors(answer):
            return super().make_context(info_name, args, parent, obj=answer, **extra)

    def invoke(self, ctx):
        """Run the command; whatever happens, its answer is printed once."""
        answer = ctx.obj
        code = OK
        try:
            with self._usage_errors(answer):
                super().invoke(ctx)
        except typer.Exit as end:
            code = end.exit_code
        except BrokenPipeError:  # the reader of a pipe has left, as `head` does
            raise
        except KeyboardInterrupt:
            code = INTERRUPTED
            answer.content.get("error") or answer.fail("stopped before the end.")
        except FAILURES as error:
            code = BAD_INPUT
            answer.fail(sentence_of(error))
        answer.finish()
        raise typer.Exit(code)

    @contextlib.contextmanager
    def _usage_errors(self, answer: Answer):
        """A misspelled option is in the document as well; typer itself prints the usage and exits with 2."""
        try:
            yield
        except UsageError as error:
            answer.content["error"] = sentence_of(ValueError(error.format_message()))
            answer.finish()
            raise


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
)


def _show_version(value: bool) -> None:
    if value:
        print(f"diffclass {VERSION}")
        raise typer.Exit()


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document and nothing else; progress goes to stderr."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="All randomness comes from it.")]


@app.callback()
def _options(
    json_wanted: Json = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
):
    """Diffusion Classifiers, step by step: the course, its models and their accuracy."""
