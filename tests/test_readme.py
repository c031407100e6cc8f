"""Every number that the README prints is in a record."""

from pathlib import Path

from diffclass.evaluation import claims

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "assets" / "records"
NAMES = {
    "cnn": "plain CNN",
    "adversarial": "CNN, adversarially trained",
    "dc": "diffusion classifier",
    "contrastive": "diffusion classifier, contrastive",
    "adversarial-dc": "diffusion classifier, adversarially trained",
    "rdc1": "RDC, 1 step",
    "rdc5": "RDC, 5 steps",
    "rdc-released": "RDC as released",
    "rdc-contrastive": "RDC, 5 steps, contrastive",
    "lm-cnn": "likelihood maximisation, plain CNN",
    "diffpure": "DiffPure, plain CNN",
    "idc": "IDC",
}


def cell(record) -> str:
    return (
        ""
        if record is None
        else (
            f"{100 * record.value:.1f} [{100 * record.low:.0f}, {100 * record.high:.0f}] "
            f"({record.n})"
        )
    )


def table(world: str, norm: str) -> list[str]:
    """The lines of the README's table of a world: a defence each, as its runs' records have it."""
    found = {}
    for path in sorted(RUNS.glob(f"{world}-attacks/*/{claims.FILE}")):
        for record in claims.kept(path.parent):
            protocol = record.settings["protocol"]
            if protocol["norm"] == norm and ": only " not in record.what:
                key = "clean" if record.what.startswith("clean") else protocol["name"]
                name = protocol["defence"], key, "worst of" in record.what
                if (
                    name not in found or found[name].n < record.n
                ):  # both protocols measure clean images
                    found[name] = record
    lines = []
    for name, words in NAMES.items():
        of = {
            key: found.get((name, *key))
            for key in (
                ("clean", False),
                ("clean", True),
                ("paper", False),
                ("honest", False),
                ("honest", True),
            )
        }
        if any(of.values()):
            lines.append(
                f"| {words} | " + " | ".join(cell(record) for record in of.values()) + " |"
            )
    return lines


def test_the_tables_of_robust_accuracies_are_those_of_the_records():
    text = (ROOT / "README.md").read_text()
    for world, norm in (("digits", "linf"), ("digits", "l2"), ("cifar10", "linf")):
        shown = text.split(f"<!-- {world} {norm} -->")[1].split("\n\n")[0].strip().splitlines()[2:]
        assert shown == table(world, norm), (
            f"the README's table of {world}, {norm} should be:\n" + "\n".join(table(world, norm))
        )


def test_a_number_that_was_changed_would_be_noticed():
    line = table("digits", "linf")[0]
    assert line in (ROOT / "README.md").read_text()
    assert line.replace("[", "[1") not in (ROOT / "README.md").read_text()
