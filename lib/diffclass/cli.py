"""The command `diffclass`: open the course, look after its files, train, classify and evaluate.

Every command fills one answer; `--json` prints it as one document at the end, also when the command failed or was
interrupted. Heavy imports are inside functions, so that `diffclass --help` answers at once.
"""

import contextlib
import functools
import json
import os
import platform
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from diffclass import __version__, assets

ROOT = Path(__file__).resolve().parents[2]
OK, PROBLEM, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
UsageError = typer.BadParameter.__base__  # typer does not export it
FAILURES = (ValueError, TypeError, ArithmeticError, OSError, ImportError)  # what the library says in one sentence
PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "plotly")
SET_UP = "Run `python3 -m lib lab` in the checkout: it installs what is missing."
EXIT_CODES = "Exit codes: 0 all is well, 1 a problem was found, 2 the input was bad, 130 interrupted."


@dataclass
class Answer:
    """What a command has found so far, and whether it is wanted as JSON."""

    json: bool = False
    content: dict = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print a line for people, at once; with --json there is only the document at the end."""
        if not self.json:
            print(text, flush=True)

    def fail(self, sentence: str) -> None:
        """One sentence on stderr, and in the document."""
        print(f"diffclass: {sentence}", file=sys.stderr, flush=True)
        self.content["error"] = sentence

    def finish(self) -> None:
        """Print the document, if it is wanted and there is anything in it."""
        if self.json and self.content:
            print(json.dumps(self.content, indent=2, ensure_ascii=False, allow_nan=False))


def _sentence(error: Exception) -> str:
    """What went wrong, on one line; the operating system's own errors name the file first."""
    system = isinstance(error, OSError) and error.filename and error.strerror
    text = f"{error.filename}: {error.strerror}" if system else str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if text.endswith("?") else text.rstrip(".") + "."


class _Commands(typer.core.TyperGroup):
    """Turns what the library raises into one sentence and an exit code, and prints the JSON document once."""

    def make_context(self, info_name, args, parent=None, **extra):
        """--json is looked up before anything is parsed: it also holds for arguments that cannot be understood."""
        answer = Answer(json="--json" in (args[:args.index("--")] if "--" in args else args))
        with self._usage_errors(answer):
            return super().make_context(info_name, args, parent, obj=answer, **extra)

    def invoke(self, ctx):
        """Run the command; whatever happens, its answer is printed once."""
        answer, code = ctx.obj, OK
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
            answer.fail(_sentence(error))
        answer.finish()
        raise typer.Exit(code)

    @contextlib.contextmanager
    def _usage_errors(self, answer: Answer):
        """A misspelled option is in the document as well; typer itself prints the usage and exits with 2."""
        try:
            yield
        except UsageError as error:
            answer.content["error"] = _sentence(ValueError(error.format_message()))
            answer.finish()
            raise


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False, epilog=EXIT_CODES)


def _show_version(value: bool) -> None:
    if value:
        print(f"diffclass {__version__}")
        raise typer.Exit()


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else; progress goes to "
                                                   "stderr.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="All randomness comes from it.")]


@app.callback()
def _options(json_wanted: Json = False, version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version.")] = False):
    """Diffusion Classifiers, step by step: the course, its models and their accuracy."""


# ---------------------------------------------------------------------------------------------------------------------
# The course and its files


@app.command(epilog=EXIT_CODES)
def lab():
    """Open the course in JupyterLab at notebooks/00_start_here.ipynb."""
    starter = ROOT / "lib" / "__main__.py"
    for path in (ROOT / "notebooks" / "00_start_here.ipynb", starter):
        if not path.exists():
            raise FileNotFoundError(f"expected the course in {ROOT}, found no {path.relative_to(ROOT)}; `diffclass "
                                    "lab` opens the checkout it was installed from, with `pip install -e`.")
    metadata.version("jupyterlab")  # raises, in one sentence, if it is missing
    arguments = runpy.run_path(str(starter))["lab"]()  # the same flags as `python3 -m lib lab`
    os.chdir(ROOT)
    env = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", **os.environ}
    os.execve(sys.executable, [sys.executable, *arguments], env)


def _check(name: str, look: Callable[[], dict | str], advice: str = "", needed: bool = True) -> dict:
    """One line of the doctor: ok, problem (with something needed) or note, what was found or how to get it."""
    try:
        found = look()
        return dict(name=name, status="ok", **(found if isinstance(found, dict) else {"detail": found}))
    except FAILURES as error:
        return dict(name=name, status="problem" if needed else "note", detail=f"{_sentence(error)} {advice}".rstrip())


def _device() -> dict:
    import torch

    kind, hardware = "cpu", platform.processor() or platform.machine()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        hardware = getattr(torch.get_device_module(kind), "get_device_name", lambda: kind)()
    facts = dict(type=kind, hardware=hardware, threads=torch.get_num_threads(), torch=torch.__version__,
                 python=platform.python_version())
    words = "{type} ({hardware}), threads: {threads}, torch {torch}, Python {python}"
    return {**facts, "detail": words.format(**facts)}


def _world_checks() -> list[dict]:
    from diffclass import cifar, data

    def digits() -> str:
        world = data.digits()
        return f"checksum ok, {len(world.train_labels)} training and {len(world.test_labels)} test pictures"

    def cifar10() -> str:
        available, sentence = cifar.cifar10_available()
        if not available:
            raise FileNotFoundError(sentence)
        return sentence

    return [_check("plane", lambda: "exact: " + ", ".join(make().name for make in data.PLANE_LAWS.values())),
            _check("digits", digits), _check("CIFAR-10", cifar10, needed=False)]


def _asset_checks() -> list[dict]:
    """The weights of the course and every other file that SHA256SUMS lists: ok, changed, unlisted or missing."""
    from diffclass import recipes

    def look(path: Path) -> str:
        assets.verified(path.name)
        card = f", {recipes.card_line(recipes.card(path))}" if path.suffix == ".safetensors" else ""
        return f"checksum ok, {path.stat().st_size} bytes{card}"

    listed = []
    found = [_check(assets.SUMS, lambda: listed.extend(assets.checksums()) or f"{len(listed)} files listed")]
    for name in dict.fromkeys([*recipes.MODELS.values(), *listed]):
        path = assets.folder() / name
        check = _check(name, functools.partial(look, path))
        wrong = "missing" if not path.exists() else "changed" if name in listed else "unlisted"
        state = "ok" if check["status"] == "ok" else wrong
        found.append({**check, "state": state, "bytes": path.stat().st_size if path.exists() else None})
    return found


@app.command(epilog=EXIT_CODES)
def doctor(ctx: typer.Context, json_wanted: Json = False):
    """Look at device, worlds, assets and packages; say what is missing and how to get it."""
    answer, problems = ctx.obj, 0
    answer.content |= dict(command="doctor", version=__version__, folder=str(assets.folder()))
    installed = [_check(name, functools.partial(metadata.version, name), SET_UP) for name in PACKAGES]
    groups = {"device": lambda: [_check("device", _device, SET_UP)], "worlds": _world_checks, "assets": _asset_checks,
              "packages": lambda: installed}
    for group, look in groups.items():
        answer.say(group)
        try:
            answer.content[group] = look()
        except ImportError as error:  # a package that the library itself stands on
            answer.content[group] = [dict(name=group, status="problem", detail=f"{error}. {SET_UP}")]
        for check in answer.content[group]:
            problems += check["status"] == "problem"
            answer.say(f"  {check['status']:8}{check['name']:28}{check['detail']}")
    answer.content["ok"] = problems == 0
    answer.say(f"{problems} to mend: see the lines that say 'problem'." if problems else "The digits course can run.")
    raise typer.Exit(PROBLEM if problems else OK)


@app.command(epilog=EXIT_CODES)
def download(ctx: typer.Context, world: Annotated[str, typer.Argument(help="What to fetch: cifar10.")],
             json_wanted: Json = False):
    """Fetch CIFAR-10 from its official source and verify it; an interrupted download goes on where it stopped."""
    from diffclass import cifar, recipes

    ctx.obj.content |= dict(command="download")
    recipes.chosen(world, ("cifar10",), "the world to download")
    path = cifar.download_cifar10()
    ctx.obj.content |= dict(file=str(path), bytes=path.stat().st_size)
    ctx.obj.say(f"{path}: {path.stat().st_size} bytes, checksum ok")


# ---------------------------------------------------------------------------------------------------------------------
# Its models


def _train_one(name: str, folder: Path, steps: int | None, seed: int) -> None:
    from tqdm import tqdm

    from diffclass import recipes

    run = recipes.stoppable(recipes.train_digits(name, folder, steps, seed))
    with contextlib.closing(run), tqdm(desc=name.partition(".")[0], unit="step", file=sys.stderr) as bar:
        for progress in run:
            bar.total, bar.n, bar.initial = progress.steps, progress.step, bar.initial or progress.step - 1
            measuring = ", measuring" if progress.step == progress.steps else ""
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {progress.seconds:.0f} s in all{measuring}")


@app.command(epilog=EXIT_CODES)
def train(ctx: typer.Context, world: Annotated[str, typer.Argument(help="What to train on: digits.")],
          steps: Annotated[int | None, typer.Option(min=1, help="Steps of each network, not the recipe's.")] = None,
          teacher_only: Annotated[bool, typer.Option("--teacher-only", help="Do not train the student.")] = False,
          out: Annotated[Path | None, typer.Option(help="Folder for the weights, not assets/.")] = None,
          seed: Seed = 0, json_wanted: Json = False):
    """Train the digits networks: a teacher, then the student that copies it. Ctrl-C keeps what is done."""
    from diffclass import recipes

    folder = out or assets.folder()
    ctx.obj.content |= dict(command="train", folder=str(folder), models=[])
    recipes.chosen(world, ("digits",), "the world to train on")
    folder.mkdir(parents=True, exist_ok=True)  # before the training, not after it, if it cannot be written
    try:
        for name in recipes.remaining(folder, teacher_only):
            _train_one(name, folder, steps, seed)
            card = recipes.card(folder / name)
            ctx.obj.content["models"].append(dict(file=str(folder / name), card=card))
            ctx.obj.say(f"{name}: {recipes.card_line(card)}, {card['images_seen']} images in {card['seconds']:.0f} s")
    except KeyboardInterrupt:
        kept = next((folder / "checkpoints").glob("*.safetensors"), None)
        ctx.obj.fail(f"stopped; the checkpoint {kept} is kept, and the same command resumes it." if kept else
                     "stopped before the first step; nothing was begun.")
        raise


@app.command(epilog=EXIT_CODES)
def classify(ctx: typer.Context, pictures: Annotated[list[str], typer.Argument(help="PNG, JPEG or WebP files.")],
             model: Annotated[str, typer.Option(help="student or teacher")] = "student", json_wanted: Json = False):
    """Name the digit in each picture; a broken file does not stop the others."""
    from diffclass import recipes

    answer, failed = ctx.obj, 0
    answer.content |= dict(command="classify", model=model, pictures=[])
    judge = recipes.judge(recipes.chosen(model, recipes.MODELS, "the model"))
    for path in pictures:
        try:
            verdict = judge(path)
        except FAILURES as error:
            failed += 1
            verdict = dict(error=_sentence(error))
            print(f"diffclass: {path}: {verdict['error']}", file=sys.stderr, flush=True)
        else:
            answer.say(f"{path}: {recipes.described(verdict)}")
        answer.content["pictures"].append(dict(file=path, **verdict))
    raise typer.Exit(BAD_INPUT if failed else OK)


@app.command(epilog=EXIT_CODES)
def evaluate(ctx: typer.Context,
             world: Annotated[str, typer.Option(help="digits, or plane:NAME for an exact law.")] = "digits",
             model: Annotated[str | None, typer.Option(help="student (the default) or teacher; digits only.")] = None,
             limit: Annotated[int | None, typer.Option(min=1, help="Pictures; all 400 digits or 1000 points.")] = None,
             levels: Annotated[int, typer.Option(min=1, help="Noise levels.")] = 16,
             weighting: Annotated[str, typer.Option(help="A name of noise.WEIGHTINGS.")] = "ELBO",
             record: Annotated[Path | None, typer.Option(help="Append the result to this .jsonl file.")] = None,
             seed: Seed = 0, json_wanted: Json = False):
    """Measure an accuracy, with its 95 % interval; on the plane next to the best that any classifier can reach."""
    from tqdm import tqdm

    from diffclass import recipes

    answer = ctx.obj
    answer.content |= dict(command="evaluate", records=[])
    trial = recipes.evaluation(world, model, limit, levels, weighting, seed)
    with tqdm(desc=world, total=len(trial.labels), unit="picture", file=sys.stderr) as bar:
        for correct, seen in recipes.hits(trial.classifier, trial.images, trial.labels, batch=50):
            bar.set_postfix_str(f"{correct / seen:.1%} correct")
            bar.update(seen - bar.n)
    for result in recipes.records(trial, correct, seed):
        answer.content["records"].append(asdict(result))
        answer.say(f"{result.what}: {result}")
        if record:
            result.append(record)


def main() -> None:
    """The entry point of the command."""
    app(prog_name="diffclass")
