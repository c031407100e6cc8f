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
    FAILURES,
    OK,
    PROBLEM,
    ROOT,
    VERSION,
    Json,
    app,
    sentence_of,
)
from diffclass.storage import assets

PACKAGES = ("jupyterlab", "ipywidgets", "anywidget", "plotly")
SET_UP = "Run `python3 -m lib lab` in the checkout: it installs what is missing."


@app.command(epilog=EXIT_CODES)
def lab():
    """Open the course in JupyterLab at notebooks/00_start_here.ipynb."""
    starter = ROOT / "lib" / "__main__.py"
    for path in (ROOT / "notebooks" / "00_start_here.ipynb", starter):
        if not path.exists():
            raise FileNotFoundError(
                f"expected the course in {ROOT}, found no {path.relative_to(ROOT)}; `diffclass "
                "lab` opens the checkout it was installed from, with `pip install -e`."
            )
    metadata.version("jupyterlab")  # raises, in one sentence, if it is missing
    arguments = runpy.run_path(str(starter))["lab"]()  # the same flags as `python3 -m lib lab`
    os.chdir(ROOT)
    env = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", **os.environ}
    os.execve(sys.executable, [sys.executable, *arguments], env)


def _check(
    name: str, look: Callable[[], dict | str], advice: str = "", needed: bool = True
) -> dict:
    """One line of the doctor: ok, problem (with something needed) or note, what was found or how to get it."""
    try:
        found = look()
        return dict(
            name=name, status="ok", **(found if isinstance(found, dict) else {"detail": found})
        )
    except FAILURES as error:
        return dict(
            name=name,
            status="problem" if needed else "note",
            detail=f"{sentence_of(error)} {advice}".rstrip(),
        )


def _device() -> dict:
    import torch

    kind = "cpu"
    hardware = platform.processor() or platform.machine()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
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
        _check("digits", digits),
        _check("CIFAR-10", cifar10, needed=False),
    ]


def _asset_checks() -> list[dict]:
    """The weights of the course and every other file that SHA256SUMS lists: ok, changed, unlisted or missing."""
    from diffclass.storage import weights
    from diffclass.zoo import networks

    def look(name: str, path: Path) -> str:
        assets.verified(name)
        size = sum(
            (path.parent / file).stat().st_size for file in assets.parts(name, assets.checksums())
        )
        card = f", {weights.card_line(weights.card(path))}" if path.suffix == ".safetensors" else ""
        return f"checksum ok, {size} bytes{card}"

    listed = []
    found = [
        _check(
            assets.SUMS, lambda: listed.extend(assets.checksums()) or f"{len(listed)} files listed"
        )
    ]
    there = [path.name for path in assets.folder().glob("*")]
    for name in dict.fromkeys([*networks.MODELS["digits"].values(), *map(assets.whole, listed)]):
        check = _check(name, functools.partial(look, name, assets.folder() / name))
        wrong = (
            "missing"
            if not assets.parts(name, there)
            else "changed"
            if assets.parts(name, listed)
            else "unlisted"
        )
        size = (
            sum((assets.folder() / file).stat().st_size for file in assets.parts(name, there))
            or None
        )
        found.append({**check, "state": "ok" if check["status"] == "ok" else wrong, "bytes": size})
    return found


@app.command(epilog=EXIT_CODES)
def doctor(ctx: typer.Context, json_wanted: Json = False):
    """Look at device, worlds, assets and packages; say what is missing and how to get it."""
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
        except ImportError as error:  # a package that the library itself stands on
            answer.content[group] = [
                dict(name=group, status="problem", detail=f"{error}. {SET_UP}")
            ]
        for check in answer.content[group]:
            problems += check["status"] == "problem"
            answer.say(f"  {check['status']:8}{check['name']:31}{check['detail']}")
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
    from diffclass.data import cifar
    from diffclass.zoo import networks

    ctx.obj.content |= dict(command="download")
    networks.chosen(world, ("cifar10",), "the world to download")
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
    from diffclass.zoo import networks

    ctx.obj.content |= dict(command="convert")
    out = out or assets.folder() / networks.MODELS["cifar10"]["edm"]
    if out.suffix != ".safetensors":
        raise ValueError(
            f"expected a name that ends in .safetensors to write to, got {out.name!r}."
        )
    denoiser, card = edm.convert(source, out)
    assets.record([out.name], out.parent)
    ctx.obj.content |= dict(file=str(out), card=card)
    ctx.obj.say(
        f"{out}: {card['parameters']} weights, {denoiser.num_classes} classes, {denoiser.image_shape[1]} "
        "pixels a side"
    )
