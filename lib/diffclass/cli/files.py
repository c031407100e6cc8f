"""Commands that open the course and look after its files: lab, doctor, download, convert."""

import functools
import os
import platform
import runpy
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import (
    EXIT_CODES,
    OK,
    PROBLEM,
    ROOT,
    VERSION,
    Json,
    app,
    sentence_of,
    show_traceback,
)

PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "plotly")
SET_UP = "Run `python3 -m lib lab` in the checkout: it installs what is missing."


def starter() -> Path:
    """What sets the course up and starts it. Errors: FileNotFoundError where the course is not there."""
    script = ROOT / "lib" / "__main__.py"
    for path in (ROOT / "notebooks" / "00_start_here.ipynb", script):
        if not path.exists():
            raise FileNotFoundError(
                f"expected the course in {ROOT}, got no {path.relative_to(ROOT)}; `diffclass` opens the checkout it was "
                "installed from, with `pip install -e`."
            )
    return script


@app.command(epilog=EXIT_CODES)
def lab():
    """Open the course in JupyterLab at notebooks/00_start_here.ipynb."""
    script = starter()
    metadata.version("jupyterlab")  # raises, in one sentence, if it is missing
    started = runpy.run_path(str(script))  # the same flags and environment as `python3 -m lib lab`
    arguments = started["lab"]()
    os.chdir(ROOT)
    env = {**started["ENVIRONMENT"], **os.environ}
    os.execve(sys.executable, [sys.executable, *arguments], env)


def _check(
    name: str, look: Callable[[], dict | str], advice: str = "", needed: bool = True
) -> dict:
    """One line of the doctor: ok, problem (with something needed) or note, what is there or how to get it."""
    try:
        facts = look()
    except Exception as error:
        show_traceback(error)
        return dict(
            name=name,
            status="problem" if needed else "note",
            detail=f"{sentence_of(error)} {advice}".rstrip(),
        )
    if isinstance(facts, str):
        facts = dict(detail=facts)
    return dict(name=name, status="ok", **facts)


def _device() -> dict:
    import torch

    from diffclass.device import device

    kind = device().type
    hardware = platform.processor() or platform.machine()
    if kind != "cpu":
        # Not every kind of accelerator has a name that can be asked for.
        hardware = getattr(torch.get_device_module(kind), "get_device_name", lambda: kind)()
    facts = dict(
        type=kind,
        hardware=hardware,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    words = "{type} ({hardware}), threads: {threads}, torch {torch}, Python {python}"
    return {**facts, "detail": words.format(**facts)}


def _world_checks() -> list[dict]:
    from diffclass import data
    from diffclass.data import cifar
    from diffclass.data.hundred import hundred

    def digits() -> str:
        world = data.digits()
        return f"checksum ok, {len(world.train_labels)} training and {len(world.test_labels)} test pictures"

    def cifar10() -> str:
        available, sentence = cifar.cifar10_available()
        if not available:
            raise FileNotFoundError(sentence)
        return sentence

    return [
        _check(
            "plane", lambda: "exact: " + ", ".join(make().name for make in data.PLANE_LAWS.values())
        ),
        _check("hundred", lambda: f"exact: {len(hundred().priors)} classes of small pictures"),
        _check("digits", digits),
        _check("CIFAR-10", cifar10, needed=False),
    ]


def _asset_checks() -> list[dict]:
    """The weights of the course and every other file that SHA256SUMS lists: ok, changed, unlisted or missing."""
    from diffclass.storage import assets, weights
    from diffclass.zoo import networks

    folder = assets.folder()
    listed = []

    def look_at_list() -> str:
        listed.extend(assets.checksums())
        return f"{len(listed)} files listed"

    def look(name: str) -> str:
        path = assets.verified(name)
        words = f"checksum ok, {size_of(assets.parts(name, listed))} bytes"
        if path.suffix != ".safetensors":
            return words
        weights.check_weights(path)
        return f"{words}, {weights.card_line(weights.card(path))}"

    def size_of(files: list[str]) -> int:
        return sum((folder / file).stat().st_size for file in files)

    def state_of(name: str, status: str) -> str:
        if status == "ok":
            return "ok"
        if not assets.parts(name, there):
            return "missing"
        return "changed" if assets.parts(name, listed) else "unlisted"

    checks = [_check(assets.SUMS, look_at_list)]
    there = [path.name for path in folder.glob("*")]
    for name in dict.fromkeys([*networks.MODELS["digits"].values(), *map(assets.whole, listed)]):
        check = _check(name, functools.partial(look, name))
        state = state_of(name, check["status"])
        size = size_of(assets.parts(name, there)) or None
        checks.append({**check, "state": state, "bytes": size})
    return checks


@app.command(epilog=EXIT_CODES)
def doctor(ctx: typer.Context, json_wanted: Json = False):
    """Look at device, worlds, assets and packages; say what is missing and how to get it."""
    from diffclass.storage import assets

    answer = ctx.obj
    problems = 0
    answer.content |= dict(command="doctor", version=VERSION, folder=str(assets.folder()))
    installed = [
        _check(name, functools.partial(metadata.version, name), SET_UP) for name in PACKAGES
    ]
    groups = {
        "device": lambda: [_check("device", _device, SET_UP)],
        "worlds": _world_checks,
        "assets": _asset_checks,
        "packages": lambda: installed,
    }
    for group, look in groups.items():
        answer.say(group)
        try:
            answer.content[group] = look()
        except Exception as error:  # such as a missing package that the library itself stands on
            show_traceback(error)
            detail = f"{sentence_of(error)} {SET_UP}"
            answer.content[group] = [dict(name=group, status="problem", detail=detail)]
        width = 2 + max((len(check["name"]) for check in answer.content[group]), default=0)
        for check in answer.content[group]:
            if check["status"] == "problem":
                problems += 1
            answer.say(f"  {check['status']:8}{check['name']:{width}}{check['detail']}")
    answer.content["ok"] = problems == 0
    answer.say(
        f"{problems} to mend: see the lines that say 'problem'."
        if problems
        else "The digits course can run."
    )
    raise typer.Exit(PROBLEM if problems else OK)


@app.command(epilog=EXIT_CODES)
def download(
    ctx: typer.Context,
    world: Annotated[str, typer.Argument(help="What to fetch: cifar10.")],
    json_wanted: Json = False,
):
    """Fetch CIFAR-10 from its official source and verify it; an interrupted download goes on where it stopped."""
    from diffclass import units
    from diffclass.data import cifar

    ctx.obj.content |= dict(command="download")
    units.chosen(world, ("cifar10",), "the world to download")
    path = cifar.download_cifar10()
    ctx.obj.content |= dict(file=str(path), bytes=path.stat().st_size)
    ctx.obj.say(f"{path}: {path.stat().st_size} bytes, checksum ok")


@app.command(epilog=EXIT_CODES)
def convert(
    ctx: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="EDM's released .pkl of a -vp- network, or its state dict.")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The file to write, not assets/cifar10-edm.safetensors.")
    ] = None,
    json_wanted: Json = False,
):
    """Turn a network that others trained into weights of the course, without running the code inside its file."""
    from diffclass.denoisers import edm
    from diffclass.storage import assets
    from diffclass.zoo import networks

    ctx.obj.content |= dict(command="convert")
    out = out or assets.folder() / networks.MODELS["cifar10"]["edm"]
    if out.suffix != ".safetensors":
        raise ValueError(
            f"expected a name that ends in .safetensors to write to, got {out.name!r}."
        )
    assets.check_name(out.name)
    denoiser, card = edm.convert(source, out)
    assets.record([out.name], out.parent)
    ctx.obj.content |= dict(file=str(out), card=card)
    ctx.obj.say(
        f"{out}: {card['parameters']} weights, {denoiser.num_classes} classes, {denoiser.image_shape[1]} "
        "pixels a side"
    )
