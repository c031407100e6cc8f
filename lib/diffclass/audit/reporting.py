"""Can a reader check the numbers? Checks 32 to 36 of stored records: intervals, settings, minima, cost, images."""

import torch

from diffclass.audit.base import AMBER, GREEN, RED, CannotJudge, Case, Verdict, check
from diffclass.intervals import interval
from diffclass.storage.results import SHARE, Record

GROUP = "reporting"
ENOUGH = 500  # images below which an accuracy is known to more than four points
CALLS = "calls per image"  # of the settings of a record


def _accuracies(case: Case) -> list[Record]:
    accuracies = [record for record in case.records if record.unit == SHARE]
    if not accuracies:
        raise CannotJudge("no stored records of accuracies were given.")
    return accuracies


def _attacked(case: Case) -> list[Record]:
    attacked = [record for record in _accuracies(case) if record.attack is not None]
    if not attacked:
        raise CannotJudge("the records hold no accuracy under attack.")
    return attacked


@check(
    32, GROUP, "print every accuracy with its binomial interval, and measure at least 500 images"
)
def interval_everywhere(case: Case) -> Verdict:
    """Whether each accuracy has its interval, Clopper & Pearson's where it says so; amber for fewer than 500 images."""
    accuracies = _accuracies(case)
    wrong = [record.what for record in accuracies if not _has_interval(record)]
    few = min(one.settings.get("n", one.n) for one in accuracies)
    widest = max((one.high - one.low) / 2 for one in accuracies)
    example = f" ({wrong[0]})" if wrong else ""
    evidence = (
        f"{len(wrong)} of {len(accuracies)} accuracies lack a true interval{example}; the "
        f"fewest images are {few}, the widest interval is +-{widest:.1%}"
    )
    if wrong:
        return RED, evidence
    return (GREEN if few >= ENOUGH else AMBER), evidence


def _has_interval(record: Record) -> bool:
    if not record.low < record.high:
        return False
    if record.method != "Clopper-Pearson":
        return True
    low, high = interval(round(record.value * record.n), record.n, record.level)
    return max(abs(record.low - low), abs(record.high - high)) <= 1e-6


@check(
    33, GROUP, "store attack, steps, draws, restarts, seed, checkpoint and version in every record"
)
def settings_printed(case: Case) -> Verdict:
    """Whether a record names what would be needed to measure it again."""
    attacked = _attacked(case)
    lacking = {}
    for record in attacked:
        protocol = record.settings.get("protocol", {})
        listed = protocol.get("attacks", ())
        named = {
            "attacks": bool(listed),
            "norm": "norm" in protocol,
            "epsilon": "epsilon" in protocol,
            "seed": record.seed is not None,
            "version": "version" in record.settings,
            "checkpoint": record.checkpoint is not None or record.settings.get("checkpoints") == {},
        }
        for name in ("steps", "draws", "restarts", "loss"):
            named[name] = bool(listed) and all(name in attack for attack in listed)
        for name in named:
            if not named[name]:
                lacking[name] = lacking.get(name, 0) + 1
    missing = ", ".join(f"{name} in {count}" for name, count in lacking.items()) or "nothing"
    evidence = f"of {len(attacked)} records under attack, missing: {missing}"
    return (RED if lacking else GREEN), evidence


@check(
    34,
    GROUP,
    "count an image as robust only if it survives all attacks, then average; never the least average",
)
def per_example_min(case: Case) -> Verdict:
    """Whether the claim counts the perturbation that was worst for each image.

    Passes when every row's strongest attack is the one with the fewest hits, and a reported average is that of the
    rows' hits; the evidence sets it beside the smallest average of a single attack, which may only be larger.
    """
    attacked = _attacked(case)
    if not case.rows:
        raise CannotJudge(
            "the records came without the rows of each image, from which minima could be taken."
        )
    draws = attacked[0].settings.get("draws", 1)
    n = len(case.rows)
    spared = 0
    sums = [0] * len(case.rows[0]["attacks"])
    for row in case.rows:
        hits = [None if entry is None else entry[0] for entry in row["attacks"]]
        fewest = min(hit for hit in hits if hit is not None)
        if hits[row["strongest"]] != fewest:
            spared += 1
        for number, hit in enumerate(hits):
            sums[number] += fewest if hit is None else hit
    claim = sum(row["hits"] for row in case.rows) / draws / n
    least = min(sums) / draws / n
    claims = [one.value for one in attacked if one.part is None and one.statistic != "worst"]
    reported = any(abs(value - claim) < 1e-6 for value in claims)
    return (RED if spared or not reported else GREEN), (
        f"per image the rows give {claim:.1%}, the smallest average of one attack {least:.1%}; reported "
        f"{', '.join(f'{value:.1%}' for value in claims) or 'nothing'}; {spared} of {n} rows spare an image"
    )


@check(
    35,
    GROUP,
    "report clean accuracy and the classifier calls per image beside every robust accuracy",
)
def clean_first(case: Case) -> Verdict:
    """Whether the clean accuracy of the same images stands beside what survives, with its cost."""
    attacked = _attacked(case)
    clean = [one for one in _accuracies(case) if one.attack is None and one.n == attacked[0].n]
    costs = [one.settings.get(CALLS) for one in attacked]
    first = f"clean: {clean[0]}" if clean else "no clean accuracy of the same images"
    cost = f"{costs[0]} classifier calls for each image" if all(costs) else "the cost is missing"
    return (GREEN if clean and all(costs) else RED), f"{first}; {cost}"


@check(
    36,
    GROUP,
    "store the perturbations, so that anybody can judge them in one pass",
    lambda case: 0 if case.deltas is None else case.repeats * len(case.x),
)
def adversarials_stored(case: Case) -> Verdict:
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
    evidence = (
        f"{n} stored perturbations judged again: {float(again.mean()):.1%} survive, stored were "
        f"{float(stored.mean()):.1%}"
    )
    if case.deterministic:
        other = int((again != stored).sum())
        return (RED if other else GREEN), f"{evidence}; {other} verdicts differ"
    error = ((again * (1 - again) + stored * (1 - stored)).sum() / draws).sqrt() / n
    gap = abs(float((again - stored).mean()))
    return (RED if gap > 4 * float(error) + 1 / n else GREEN), evidence
