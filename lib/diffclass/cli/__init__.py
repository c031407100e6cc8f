"""The command `diffclass`: open the course, look after its files, train, classify, evaluate, list, and write it as pages."""

from diffclass.cli import (
    auditing,
    certifying,
    edition,
    evaluation,
    exploring,
    files,
    models,
    readme,
    scoreboard,
)
from diffclass.cli.base import EXIT_CODES, ROOT, app

__all__ = [
    "EXIT_CODES",
    "ROOT",
    "app",
    "auditing",
    "certifying",
    "edition",
    "evaluation",
    "exploring",
    "files",
    "main",
    "models",
    "readme",
    "scoreboard",
]


def main() -> None:
    """The entry point of the command."""
    app(prog_name="diffclass")
