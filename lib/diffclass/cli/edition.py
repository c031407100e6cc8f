"""The command that writes the course as pages to read: html."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from diffclass.cli.base import EXIT_CODES, OK, PROBLEM, ROOT, Json, app, is_first, sentence_of

SITE = ROOT / "build" / "html"


@app.command(epilog=EXIT_CODES)
def html(
    ctx: typer.Context,
    to: Annotated[Path, typer.Option(help="The folder of the site.")] = SITE,
    slides: Annotated[
        str | None,
        typer.Option(metavar="NOTEBOOK", help="Also slides of one notebook, such as 03."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run the notebooks first, so that their outputs are in.")
    ] = False,
    json_wanted: Json = False,
):
    """Write the course as one site to read: it needs no kernel, no network and nothing that lies outside its folder.

    Without --run notebooks are shown with the pictures of their live figures and without outputs. Pages of notebooks that
    did not change are kept, so that the command goes on where it was stopped. Exit code 1 if a notebook fails.
    """
    import sys

    from tqdm import tqdm

    from diffclass.edition import chapters, pages, running
    from diffclass.edition import slides as lecture

    answer = ctx.obj
    listed = chapters.chapters()
    chosen = None if slides is None else chapters.find(slides, listed)
    execute = functools.cache(running.executed) if run else None  # slides ask once more
    answer.content |= dict(command="html", folder=str(to), run=run)
    to.mkdir(parents=True, exist_ok=True)
    written = []
    total = len(listed) + len(chapters.EXTRAS) + 1
    with tqdm(
        desc="pages", unit="page", total=total, file=sys.stderr, disable=not is_first()
    ) as bar:
        for page in pages.build(to, execute, listed):
            bar.set_postfix_str(page.name)
            bar.update()
            written.append(page)
    failed = [page for page in written if page.problem]
    for page in failed:
        answer.fail(sentence_of(page.problem), about=page.name)
    answer.content |= dict(
        pages=[page.name for page in written if not page.problem],
        kept=[page.name for page in written if page.kept],
        failed={page.name: sentence_of(page.problem) for page in failed},
    )
    if chosen is not None:
        notebook = chapters.read(chosen.path) if execute is None else execute(chosen)
        path = lecture.write(notebook, chosen, to)
        answer.content |= dict(slides=str(path))
        answer.say(f"slides: {path}")
    kept = sum(page.kept for page in written)
    answer.say(f"{len(written) - len(failed)} pages, {kept} of them kept: {to / 'index.html'}")
    raise typer.Exit(PROBLEM if failed else OK)
