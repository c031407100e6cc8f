"""The command `diffclass`: open the course, look after its files, train, classify and evaluate."""

from diffclass.cli import auditing, evaluation, files, models
from diffclass.cli.base import EXIT_CODES, ROOT, app

__all__ = ["EXIT_CODES", "ROOT", "app", "auditing", "evaluation", "files", "main", "models"]


def main() -> None:
    """The entry point of the command."""
    app(prog_name="diffclass")
