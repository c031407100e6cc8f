"""What every command stands on: one answer, one edge where failures end, exit codes that mean one thing.

Every command fills one answer; `--json` prints it as one document at the end, also when the command failed or was
interrupted. Whatever is raised anywhere below becomes one sentence and an exit code here, and nowhere else. Heavy
imports are inside functions, so that `diffclass --help` answers at once.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from diffclass import __version__ as VERSION
from diffclass.storage.files import Busy

ROOT = Path(__file__).resolve().parents[3]
OK = 0
PROBLEM = 1
BAD_INPUT = 2
FAILED = 3
INTERRUPTED = 130
UsageError = typer.BadParameter.__base__  # typer does not export it
EXIT_CODES = (
    "Exit codes: 0 all is well; 1 a problem was found (a claim that does not stand, a red light, something for the "
    "doctor); 2 the input or the command line was bad; 3 it failed for another reason (a full disk, no memory, no "
    "network, a fault of the program); 130 interrupted. DIFFCLASS_TRACEBACK=1 shows where an error arose."
)
TRACEBACK = "DIFFCLASS_TRACEBACK"
LONGEST = 300  # characters of what another library says of its error
# A file that cannot be, by the name that was given: other errors of the system are not the reader's.
BAD_FILES = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
# What says in its own words what went wrong; of any other exception the reader is told that it is the program's fault.
SPOKEN = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    Busy,
)
# More than these cannot be meant, and would only fail later, for want of memory.
MANY_PICTURES = 1_000_000
MANY_LEVELS = 10_000
MANY_STEPS = 10_000_000
MANY_DRAWS = 10_000


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


def watched(run, what: str, total: int, note=lambda item: ""):
    """The same items behind a progress bar, with a note on the last one."""
    from tqdm import tqdm

    with (
        contextlib.closing(run),
        tqdm(
            desc=what, unit="picture", total=total, file=sys.stderr, disable=not is_first()
        ) as bar,
    ):
        for item in run:
            bar.set_postfix_str(note(item))
            bar.update(item.images - bar.n)
            yield item


@dataclass
class Answer:
    """The answer of a command so far, and whether it is wanted as JSON."""

    json: bool = False
    content: dict = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a line for people, at once; with --json there is only the document at the end."""
        if not self.json and is_first():
            print(text, flush=True)

    def fail(self, sentence: str, about: str | None = None) -> None:
        """One sentence on stderr, and in the document; one about a part of the work, such as a file, only on stderr."""
        words = sentence if about is None else f"{about}: {sentence}"
        with contextlib.suppress(OSError):  # stderr itself may be closed or full
            print(f"diffclass: {words}", file=sys.stderr, flush=True)
        if about is None:
            self.content["error"] = sentence

    def failed(self, error: Exception, about: str | None = None) -> int:
        """Say in one sentence what went wrong; the exit code for it."""
        show_traceback(error)
        self.fail(sentence_of(error), about)
        return code_of(error)

    def finish(self, code: int) -> int:
        """Print the document, if it is wanted; the exit code, another one if it could not be printed."""
        text = ""
        if self.json and is_first():
            try:
                text = json.dumps(self.content, indent=2, allow_nan=False) + "\n"
            except (TypeError, ValueError) as error:
                sentence = f"expected an answer of finite numbers and words, got one that is no JSON ({error})."
                self.content = {"command": self.content.get("command")}
                self.fail(sentence)
                code = FAILED
                text = json.dumps(self.content, indent=2) + "\n"
        try:
            if sys.stdout is not None:
                sys.stdout.write(text)
                sys.stdout.flush()
        except OSError as error:
            _abandon_stdout()
            return code if "error" in self.content else self.failed(error)
        return code


def _abandon_stdout() -> None:
    """Send what is still to be printed nowhere: it cannot be printed, and Python would try once more at its end."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


# ---------------------------------------------------------------------------------------------------------------------
# What went wrong


def show_traceback(error: BaseException) -> None:
    """Print where an error arose, for those who have asked for it by DIFFCLASS_TRACEBACK=1."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        with contextlib.suppress(OSError):
            traceback.print_exception(error, file=sys.stderr)


def code_of(error: Exception) -> int:
    """The exit code of a failure: bad input, which another input mends, or another reason.

    The library raises ValueError for whatever is wrong with what it was given.
    """
    if isinstance(error, (ValueError, *BAD_FILES)) or _is_home(error):
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno in BAD_NAMES:
        return BAD_INPUT
    return FAILED


def sentence_of(error: Exception) -> str:
    """What went wrong, on one line; the operating system's own errors name the file first."""
    text = " ".join(_words_of(error).split())
    return text if text.endswith("?") else text.rstrip(".") + "."


def _words_of(error: Exception) -> str:
    words = str(error)
    if _is_memory(error):
        return (
            f"memory ran out ({_shortened(words) or type(error).__name__}); ask for less at once: fewer pictures, "
            "levels or draws, or a smaller --batch."
        )
    if isinstance(error, BrokenPipeError):
        return "the reader of the output left before its end."
    if isinstance(error, OSError) and error.strerror:
        # A name of bytes that are no UTF-8 is shown with its escapes.
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if _is_home(error):
        return f"{words.rstrip('.')} of a path that begins with ~; write it out."
    if isinstance(error, SPOKEN) and words:
        return words
    return (
        f"{type(error).__name__}: {_shortened(words) or 'no reason given'}; this is a fault of the program and not "
        f"of what you asked: {TRACEBACK}=1 shows where it arose, for a report."
    )


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: torch says so by a RuntimeError whose words depend on the device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = str(error).lower()
    reasons = ("can't allocate memory", "not enough memory", "out of memory", "storage size calc")
    return isinstance(error, RuntimeError) and any(reason in words for reason in reasons)


def _is_home(error: Exception) -> bool:
    """Whether a path began with ~ and a user who does not exist."""
    return type(error) is RuntimeError and "home directory" in str(error)


def _shortened(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


# ---------------------------------------------------------------------------------------------------------------------
# The edge


@contextlib.contextmanager
def edge(answer: Answer) -> Iterator[None]:
    """Whatever is raised inside ends here: in one sentence on stderr, one document with --json, and an exit code.

    With --json, what libraries print meanwhile goes to stderr: only the document is on stdout.
    """
    aside = contextlib.redirect_stdout(sys.stderr) if answer.json else contextlib.nullcontext()
    try:
        with aside:
            yield
    except UsageError as error:  # typer itself prints the usage and exits with 2
        answer.content["error"] = sentence_of(ValueError(error.format_message()))
        answer.finish(BAD_INPUT)
        raise
    except typer.Exit as end:
        raise typer.Exit(answer.finish(end.exit_code)) from None
    except KeyboardInterrupt as error:
        show_traceback(error)
        if "error" not in answer.content:
            answer.fail("stopped before the end.")
        raise typer.Exit(answer.finish(INTERRUPTED)) from None
    except Exception as error:
        raise typer.Exit(answer.finish(answer.failed(error))) from None


class _Commands(typer.core.TyperGroup):
    """Runs every command behind the edge."""

    def make_context(self, info_name, args, parent=None, **extra):
        """--json is looked up before anything is parsed: it also holds for arguments that cannot be understood."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # names may hold what the terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        answer = Answer(json="--json" in (args[: args.index("--")] if "--" in args else args))
        with edge(answer):
            return super().make_context(info_name, args, parent, obj=answer, **extra)

    def invoke(self, ctx):
        """Run the command; whatever happens, its answer is printed once."""
        with edge(ctx.obj):
            super().invoke(ctx)
            raise typer.Exit(OK)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
)


def _show_version(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.obj.content["version"] = VERSION
        ctx.obj.say(f"diffclass {VERSION}")
        raise typer.Exit()


def _budget(text: str) -> float:
    """A budget as it is written: a number such as 8 or 0.03, or a fraction such as 8/255."""
    above, slash, below = str(text).partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(
            f"expected a number or a fraction, such as 0.03 or 8/255, got {text!r}."
        )
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document and nothing else; progress goes to stderr."
    ),
]


def finite(value: float | None) -> float | None:
    """An option's number, unless it is NaN or infinite: both pass every bound."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}.")
    return value


Epsilon = Annotated[
    float | None,
    typer.Option(
        parser=_budget,
        metavar="NUMBER",
        help="Budget in pixels of [0,1], such as 0.03 or 8/255, not the world's.",
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
