"""Can a reader check the numbers? Checks 32 to 36 of stored records: intervals, settings, minima, cost, images."""

import torch

from diffclass.audit.base import AMBER, GREEN, RED, CannotJudge, Case, Found, check
from diffclass.intervals import interval

GROUP = "reporting"
ENOUGH = 500  # images below which an accuracy is known to more than four points
CLEAN = "clean accuracy"  # how the records of a run under attack begin
ATTACKED = "upper bound of the robust accuracy"


def _accuracies(case: Case) -> list:
    found = [record for record in case.records if record.unit == "share"]
    if not found:
        raise CannotJudge("no stored records of accuracies were given.")
    return found


def _attacked(case: Case) -> list:
    found = [record for record in _accuracies(case) if record.what.startswith(ATTACKED)]
    if not found:
        raise CannotJudge("the records hold no accuracy under attack.")
    return found


@check(
    32, GROUP, "print every accuracy with its binomial interval, and measure at least 500 images"
)
def interval_everywhere(case: Case) -> Found:
    """Whether each accuracy has its interval, Clopper & Pearson's where it says so; amber for fewer than 500 images."""
    found = _accuracies(case)
    wrong = []
    for record in found:
        exact = interval(round(record.value * record.n), record.n, record.level)
        if (
            not record.low < record.high
            or record.method == "Clopper-Pearson"
            and max(abs(record.low - exact[0]), abs(record.high - exact[1])) > 1e-6
        ):
            wrong.append(record.what)
    few = min(one.settings.get("n", one.n) for one in found)
    widest = max((one.high - one.low) / 2 for one in found)
    told = (
        f"{len(wrong)} of {len(found)} accuracies lack a true interval{f' ({wrong[0]})' if wrong else ''}; the "
        f"fewest images are {few}, the widest interval is +-{widest:.1%}"
    )
    return (RED if wrong else GREEN if few >= ENOUGH else AMBER), told


@check(
    33, GROUP, "store attack, steps, draws, restarts, seed, checkpoint and version in every record"
)
def settings_printed(case: Case) -> Found:
    """Whether a record names what would be needed to measure it again."""
    found = _attacked(case)
    lacking = {}
    for record in found:
        protocol = record.settings.get("protocol", {})
        has = {
            "attacks": bool(protocol.get("attacks")),
            "norm": "norm" in protocol,
            "epsilon": "epsilon" in protocol,
            "seed": record.seed is not None,
            "version": "version" in record.settings,
            "checkpoint": record.checkpoint is not None or record.settings.get("checkpoints") == {},
        }
        for name in ("steps", "draws", "restarts", "loss"):
            has[name] = has["attacks"] and all(name in attack for attack in protocol["attacks"])
        for name in (name for name, there in has.items() if not there):
            lacking[name] = lacking.get(name, 0) + 1
    told = ", ".join(f"{name} in {count}" for name, count in lacking.items()) or "nothing"
    return (RED if lacking else GREEN), f"of {len(found)} records under attack, missing: {told}"


@check(
    34,
    GROUP,
    "count an image as robust only if it survives all attacks, then average; never the least average",
)
def per_example_min(case: Case) -> Found:
    """Whether the claim counts the perturbation that was worst for each image.

    Passes when every row's strongest attack is the one with the fewest hits, and a reported average is that of the
    rows' hits; the evidence sets it beside the smallest average of a single attack, which may only be larger.
    """
    found = _attacked(case)
    if not case.rows:
        raise CannotJudge(
            "the records came without the rows of each image, from which minima could be taken."
        )
    draws = found[0].settings.get("draws", 1)
    n = len(case.rows)
    spared = 0
    sums = {}
    for row in case.rows:
        done = {name: entry[0] for name, entry in row["attacks"].items() if entry}
        spared += done[row["strongest"]] > min(done.values())
        for name, entry in row["attacks"].items():
            sums[name] = sums.get(name, 0) + (entry[0] if entry else min(done.values()))
    claim = sum(row["hits"] for row in case.rows) / draws / n
    least = min(sums.values()) / draws / n
    claimed = [one.value for one in found if ": " not in one.what.partition(ATTACKED)[2]]
    reported = any(abs(value - claim) < 1e-6 for value in claimed)
    return (RED if spared or not reported else GREEN), (
        f"per image the rows give {claim:.1%}, the smallest average of one attack {least:.1%}; reported "
        f"{', '.join(f'{value:.1%}' for value in claimed) or 'nothing'}; {spared} of {n} rows spare an image"
    )


@check(
    35,
    GROUP,
    "report clean accuracy and the classifier calls per image beside every robust accuracy",
)
def clean_first(case: Case) -> Found:
    """Whether the clean accuracy of the same images stands beside what survives, with its cost."""
    found = _attacked(case)
    clean = [one for one in _accuracies(case) if one.what.startswith(CLEAN) and one.n == found[0].n]
    costs = [one.settings.get("classifier calls per image") for one in found]
    told = (f"clean: {clean[0]}" if clean else "no clean accuracy of the same images") + (
        f"; {costs[0]} classifier calls for each image" if all(costs) else "; the cost is not told"
    )
    return (GREEN if clean and all(costs) else RED), told


@check(36, GROUP, "store the perturbations, so that anybody can judge them in one pass")
def adversarials_stored(case: Case) -> Found:
    """Whether perturbations were stored, and fool today as the rows say; check 6 judges their size.

    Passes for a deterministic classifier when every verdict recurs; for a random one when the mean accuracy is within
    four standard errors.
    """
    _attacked(case)
    if case.deltas is None or not case.rows:
        return RED, "no perturbations were stored with the records"
    n = len(case.x)
    draws = case.records[0].settings.get("draws", 1)
    stored = torch.tensor([row["hits"] for row in case.rows[:n]], dtype=torch.float64) / draws
    again = 1 - case.wrong(case.main.x, case.everyone)
    told = (
        f"{n} stored perturbations judged again: {float(again.mean()):.1%} survive, stored were "
        f"{float(stored.mean()):.1%}"
    )
    if case.deterministic:
        other = int((again != stored).sum())
        return (RED if other else GREEN), f"{told}; {other} verdicts differ"
    error = ((again * (1 - again) + stored * (1 - stored)).sum() / draws).sqrt() / n
    return (RED if abs(float((again - stored).mean())) > 4 * float(error) + 1 / n else GREEN), told
