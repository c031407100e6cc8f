"""Whether a verifier who trusts none of it agrees with what a run under attack claims."""

import itertools
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from diffclass import attacks, intervals
from diffclass.classifiers.base import BLOCK, Classifier
from diffclass.data.worlds import POINTS, World
from diffclass.evaluation import protocols, runs
from diffclass.evaluation.claims import records_of
from diffclass.evaluation.protocols import Protocol
from diffclass.evaluation.runs import Run
from diffclass.noise import generator_of, seed_of
from diffclass.storage import files
from diffclass.storage.results import Record

NEW = "found-by-verify.jsonl"  # in the folder of a run: perturbations that its attacks have missed
REATTACK = 8  # survivors that are attacked again, unless another number is asked for
ALPHA = 0.001  # how often chance alone may call an honest claim wrong, by each of the tests
CHANGED = 0.01  # the same of a single image: how surely a new perturbation leaves fewer draws than the stored one
MARGIN = 0.03  # of 1 + |margin|: how far a margin may be off, for another machine's sums and 16-bit perturbations
USED = 0.9  # of the budget, that the largest perturbation of a protocol reaches
FEW = 16  # images, of which any number may be claimed; of more, a round one
FRESH = "with noise of the verification's own"


@dataclass
class Verification:
    """What a check of a claim has seen so far; the claim stands if `faults` stays empty.

    faults      sentences, in the order of the images
    images      how many of `total` have been asked about again
    seed        of the verification's own noise and attacks
    about       what the claim is about, in words: images, protocol and budget
    established what the verification itself has seen, in words; open: what it has not, and nobody should conclude
    judged      of a random classifier: name -> [hits claimed, hits with new noise, of how many draws]
    attacked    survivors that were attacked again; new: for each that fell, what its record does not know
    note        what is being done, for a progress bar
    """

    total: int
    seed: int = 0
    images: int = 0
    faults: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    established: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    judged: dict[str, list[int]] = field(default_factory=dict)
    attacked: int = 0
    new: list[dict] = field(default_factory=list)
    note: str = ""


def own_seed() -> int:
    """A seed that nobody could know when a claim was written."""
    return secrets.randbits(32)


def named_protocol(classifier: Classifier, paper: str, claimed: Protocol) -> Protocol:
    """The protocol that a claim names, as the library defines it for this classifier.

    Shapes      paper: the paper's protocol of the classifier's entry
    Errors      ValueError for a protocol that the library does not know
    """
    if claimed.name == "single":
        return protocols.single(claimed.attacks[0], claimed.norm, claimed.epsilon)
    return protocols.named(
        claimed.name, claimed.version, classifier, paper, claimed.norm, claimed.epsilon
    )


def verify(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    run: Run,
    checkpoints: dict[str, str],
    claimed: Sequence[Record],
    paper: str,
    *,
    world: World | None = None,
    seed: int | None = None,
    reattack: int = REATTACK,
) -> Iterator[Verification]:
    """Check a finished run, block by block, as one who trusts nothing in its folder; the last item yielded is the result.

    Checked     weights, images, protocol, budget and counts are those that are named; perturbations are inside the budget
                and [0,1]; the classifier, asked again with the same noise, answers as the rows say; asked with new noise,
                it answers as often right as chance allows; the records follow from the rows; of the survivors, a sample is
                attacked again by the protocol's own attacks
    Statistics  new noise: given how often each image was right in both judgements together, the claim's share of that is
                hypergeometric, image by image, if its noise was not chosen; the claimed sum, and the number of images
                that are always right, lie in the middle 99.9 %. New attacks: if no more images fall than the claim's own
                interval allows, more falls than those of the sample have a chance of at least 0.1 % (binomial)
    Shapes      images [N,C,H,W], labels [N]: the library's own first N, whatever the folder says; checkpoints: file ->
                SHA-256 of today; paper: the protocol of the classifier's own paper; world: for its budget, if it has one
    Randomness  `seed`, by keys that no run draws from; None for one that nobody could know beforehand
    """
    state = Verification(len(run.rows), own_seed() if seed is None else seed)
    state.faults += run.oddities
    state.faults += _other_settings(images, labels, run, checkpoints)
    state.faults += _other_world(images, run, world)
    state.faults += _other_count(classifier, run)
    state.faults += _other_protocol(classifier, run, paper)
    state.faults += _other_budget(images, run)
    state.faults += _impossible(run)
    if run.finished < run.settings["n"] or not run.rows:
        state.faults.append(
            f"the run is not finished: {run.finished} of {run.settings['n']} images; its number is no claim yet."
        )
    else:
        state.faults += _unlike(run, claimed)
    state.about = _about(images, run, world)
    unasked = _unaskable(images, run)
    state.faults += unasked
    asked = 0 if unasked else min(len(images), len(run.rows))
    part = replace(run, rows=run.rows[:asked], deltas=run.deltas[:asked])
    images = images[:asked]
    labels = labels[:asked]
    if asked:
        state.faults += _outside(images, part) + _inconsistent(labels, part)
    part = replace(part, deltas=part.deltas.nan_to_num(0, 0, 0))
    again = yield from _asked(classifier, images, labels, part, state)
    if state.images < run.settings["n"]:
        state.faults.append(
            f"only {state.images} of the {run.settings['n']} images of the claim could be asked about."
        )
    if not classifier.deterministic:
        state.faults += _lucky(part, again, state)
    # A claim that is forged already needs no attack to fall.
    if reattack and not state.faults:
        named = named_protocol(classifier, paper, run.protocol)
        yield from _attacked(classifier, images, labels, part, named, again, reattack, state)
    _conclude(classifier, part, reattack, state)
    yield state


# ---------------------------------------------------------------------------------------------------------------------
# What the claim says of itself, compared with what the library knows


def _other_settings(
    images: Tensor, labels: Tensor, run: Run, checkpoints: dict[str, str]
) -> list[str]:
    """Settings that are not those of the weights and images at hand, or that no run has."""
    stored = run.settings["checkpoints"]
    faults = [
        f"weights {name}: the claim is about {stored.get(name, 'none')[:12]}, these are "
        f"{checkpoints.get(name, 'none')[:12]}."
        for name in sorted(stored | checkpoints)
        if stored.get(name) != checkpoints.get(name)
    ]
    if runs.fingerprint(images, labels) != run.settings["images"]:
        faults.append("the images or labels are not those of the claim.")
    unknown = sorted(set(run.settings) - runs.NEEDED - {"version"})
    if unknown:
        faults.append(f"the settings have {unknown}, which no run has.")
    return faults


def _other_world(images: Tensor, run: Run, world: World | None) -> list[str]:
    """A world that is not attacked, or a number of its images that somebody may have stopped at."""
    if world is None:
        return []
    if world.corruption is not None or world.name == "gallery":
        return [f"claims are about clean test images, this one is about {world.name}."]
    faults = []
    if world.name != run.settings["world"]:
        faults.append(
            f"the world is called {world.name!r}, the claim is about {run.settings['world']!r}."
        )
    n = run.settings["n"]
    if len(images) < n:
        return [
            *faults,
            f"the claim is about {n} images, but {world.name} has {len(images)} for {len(run.rows)} rows.",
        ]
    try:
        check_count(world, n)
    except ValueError as error:
        faults.append(f"the claim is about a number of images that may be chosen: {error}")
    return faults


def check_count(world: World, n: int) -> int:
    """Return how many images of a world a claim is about if nobody can have stopped where luck is best.

    Errors      ValueError for more than `FEW` images that are neither a round number nor all of them
    """
    if not _is_round(n) and not _is_whole(world, n):
        less = next(fewer for fewer in range(n - 1, 0, -1) if _is_round(fewer))
        more = next(greater for greater in itertools.count(n + 1) if _is_round(greater))
        raise ValueError(
            f"expected a claim of more than {FEW} images to be about a multiple of 8 (from {BLOCK} on of 50 or {BLOCK}) or "
            f"all of them, so that nobody stops where luck is best, got the first {n}; attack with --limit {less} or {more}."
        )
    return n


def _is_round(n: int) -> bool:
    if n <= FEW:
        return True
    return n % 8 == 0 if n <= BLOCK else n % 50 == 0 or n % BLOCK == 0


def _is_whole(world: World, n: int) -> bool:
    """Whether this is the number of all images of a world, or of the points that are drawn where nothing is asked for."""
    if world.law is not None:
        return n == POINTS
    return len(world.test(n + 1)[0]) == n


def _other_count(classifier: Classifier, run: Run) -> list[str]:
    """Settings that count other images than there are rows, or other draws than the protocol asks for."""
    settings = run.settings
    draws = runs.draws_of(classifier, run.protocol)
    faults = []
    if settings["n"] != len(run.rows):
        faults.append(f"the claim is about {settings['n']} images, but has {len(run.rows)} rows.")
    if settings["draws"] != draws:
        faults.append(
            f"the claim is about {settings['draws']} draws, its protocol asks for {draws}."
        )
    return faults


def _other_protocol(classifier: Classifier, run: Run, paper: str) -> list[str]:
    """A protocol that is not what its name says in this library."""
    claimed = run.protocol
    try:
        named = named_protocol(classifier, paper, claimed)
    except ValueError as error:
        return [str(error)]
    ours = named.as_json()
    theirs = claimed.as_json()
    differing = sorted(name for name in ours if ours[name] != theirs[name])
    if differing:
        return [f"the protocol is not what {claimed.key} is here: {', '.join(differing)} differ."]
    return []


def _unaskable(images: Tensor, run: Run) -> list[str]:
    """Perturbations that cannot be done to these images."""
    wanted = attacks.threat(run.protocol.norm).shape(tuple(images.shape[1:]))
    if tuple(run.deltas.shape[1:]) == wanted:
        return []
    return [
        f"the perturbations are of shape {list(run.deltas.shape[1:])}, but {list(wanted)} for these images: nothing could "
        "be asked."
    ]


def _other_budget(images: Tensor, run: Run) -> list[str]:
    """A budget that cannot be meant, or that the perturbations have never used."""
    protocol = run.protocol
    try:
        attacks.threat(protocol.norm).check(protocol.epsilon, tuple(images.shape[1:]))
    except (ValueError, TypeError) as error:
        return [str(error)]
    largest = max(run.sizes, default=0.0)
    if protocol.name != "single" and 0 < largest < USED * protocol.epsilon:
        return [
            f"no perturbation is larger than {largest:.6g}, but the budget is {protocol.epsilon:.6g}: attacks of "
            f"{protocol.key} use all of it, so this is not the budget that they had."
        ]
    return []


def _impossible(run: Run) -> list[str]:
    """Rows that no run writes: counts beyond the draws, attacks left out, another cost than that of the attacks."""
    protocol = run.protocol
    draws = run.settings["draws"]
    faults = []
    for row in run.rows:
        name = f"image {row['index']}"
        counts = [row["clean"], row["hits"], *(entry[0] for entry in row["attacks"] if entry)]
        if any(count is not None and not 0 <= count <= draws for count in counts):
            faults.append(f"{name}: a count of hits is not between 0 and {draws}.")
        if len(row["attacks"]) != 1 + len(protocol.runs()):
            faults.append(f"{name}: it lacks entries of attacks.")
            continue
        fallen = False
        for place, entry in enumerate(row["attacks"]):
            if (entry is None) != fallen:
                which = "was left out" if entry is None else "was not needed, but is there"
                faults.append(f"{name}: attack {place} {which}.")
                break
            fallen = fallen or entry[0] == 0
        wanted = runs.calls_of(row, protocol, draws)
        if row["calls"] != wanted:
            faults.append(f"{name}: it says {row['calls']} calls, its attacks take {wanted}.")
    return faults


def _outside(images: Tensor, run: Run) -> list[str]:
    """Perturbations that no attack with this budget may return."""
    protocol = run.protocol
    beyond = attacks.threat(protocol.norm).outside(images.cpu(), run.deltas).tolist()
    faults = [
        f"image {i}: the perturbation's {protocol.norm} size is {size:.6g}, more than the budget "
        f"{protocol.epsilon:.6g}."
        for i, size in enumerate(run.sizes)
        if not size <= protocol.epsilon + runs.SLACK
    ]
    return faults + [
        f"image {i}: the perturbed image leaves [0,1]."
        for i, far in enumerate(beyond)
        if not far <= runs.SLACK
    ]


def _inconsistent(labels: Tensor, run: Run) -> list[str]:
    """Rows that name another label, or another attack than the strongest; a clean image that is perturbed."""
    faults = []
    for row, label, delta in zip(run.rows, labels.tolist(), run.deltas, strict=True):
        if row["label"] != label:
            faults.append(f"image {row['index']}: the label is {label}, not {row['label']}.")
        if not _names_strongest(row):
            faults.append(
                f"image {row['index']}: attack {row['strongest']!r} is not its strongest attack."
            )
        elif row["strongest"] == 0 and bool(delta.any()):
            faults.append(
                f"image {row['index']}: no attack was stronger than the clean image, but it is perturbed."
            )
    return faults


def _names_strongest(row: dict) -> bool:
    place = row["strongest"]
    if type(place) is not int or not 0 <= place < len(row["attacks"]):
        return False
    strongest = row["attacks"][place]
    if strongest is None:
        return False
    return not any(
        (-entry[0], entry[1]) > (-strongest[0], strongest[1]) for entry in row["attacks"] if entry
    )


def _unlike(run: Run, claimed: Sequence[Record]) -> list[str]:
    """Records that do not follow from the rows, or rows that no record follows from."""
    try:
        now = records_of(run)
    except ValueError as error:
        return [f"no records follow from the rows: {error}"]
    return _contradicted(now, claimed)


def _contradicted(now: list[Record], claimed: Sequence[Record]) -> list[str]:
    """Records that do not follow from the rows."""
    compared = [part.name for part in fields(Record) if part.name != "when"]
    known = {_key(record): record for record in now}
    faults = []
    for record in claimed:
        own = known.get(_key(record))
        wrong = [name for name in compared if own and getattr(own, name) != getattr(record, name)]
        if own is None or wrong:
            which = f": {wrong}" if wrong else ""
            faults.append(f"the record {record.what!r} does not follow from the rows{which}.")
    claims = [_key(record) for record in claimed]
    missing = [record for key, record in known.items() if key not in claims]
    twice = [record for key, record in known.items() if claims.count(key) > 1]
    faults += [f"the record {record.what!r} is missing." for record in missing]
    return faults + [f"the record {record.what!r} is there more than once." for record in twice]


def _key(record: Record) -> tuple:
    return (
        record.metric,
        record.world,
        record.classifier,
        record.attack,
        record.part,
        record.statistic,
        record.detail,
    )


def _about(images: Tensor, run: Run, world: World | None) -> list[str]:
    """What the claim is about, in words: its images, its protocol and its budget."""
    protocol = run.protocol
    settings = run.settings
    n = settings["n"]
    whole = world is not None and len(images) == n and _is_whole(world, n)
    which = f"all {n}" if whole else f"the first {n}"
    sentences = [f"{settings['classifier']} on {which} test images of {settings['world']}"]
    if protocol.name == "single":
        sentences.append(
            f"a single attack, {protocol.attacks[0]}, chosen by whoever ran it: not a protocol"
        )
    else:
        listed = "; ".join(map(str, protocol.attacks))
        sentences.append(f"the protocol {protocol.key} as this library defines it: {listed}")
    unit = attacks.threat(protocol.norm).unit
    budget = f"the budget {protocol.norm} {protocol.epsilon:.6g} in {unit}"
    usual = None if world is None else _usual(world, protocol.norm)
    if usual is not None and protocol.epsilon != usual:
        budget += f", not the {usual:.6g} of {world.name}: the number says nothing about that"
    sentences.append(budget)
    if settings["seed"] != 0:
        sentences.append(f"noise of the seed {settings['seed']}, chosen by whoever ran it")
    return sentences


def _usual(world: World, norm: str) -> float | None:
    try:
        return world.budget(norm)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Asked again: with the same noise, and with new noise


@dataclass
class _Again:
    """Hits on clean and on perturbed images with new noise; without noise they are those of the record."""

    clean: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)


def _asked(
    classifier: Classifier, images: Tensor, labels: Tensor, run: Run, state: Verification
) -> Iterator[Verification]:
    """Ask about every image with the noise of the record and with new noise; returns the answers with new noise."""
    again = _Again()
    state.note = "asked again"
    same = runs.rejudged(classifier, images, labels, run)
    fresh = runs.judged_afresh(classifier, images, labels, run, seed_of(state.seed, "verify"))
    selected = runs.reselected(classifier, images, labels, _selectable(run))
    for clean, hits in same:
        rows = run.rows[state.images : state.images + len(hits)]
        state.faults += _other_answers(rows, clean, hits, run.settings["draws"])
        if _repeats_selections(classifier, run):
            state.faults += _other_selections(rows, next(selected))
        if not classifier.deterministic:
            clean, hits = next(fresh)
        again.clean += clean
        again.hits += hits
        state.images += len(hits)
        yield state
    return again


def _other_answers(rows: list[dict], clean: list, hits: list, draws: int) -> list[str]:
    """Images about which the classifier does not answer as their rows say."""
    faults = []
    for row, again, attacked in zip(rows, clean, hits, strict=True):
        pairs = (("clean", again, row["clean"]), ("perturbed", attacked, row["hits"]))
        for name, now, claimed in pairs:
            if now != claimed:
                faults.append(
                    f"image {row['index']}: {name}, {now} of {draws} draws are right, not {claimed}."
                )
    return faults


def _repeats_selections(classifier: Classifier, run: Run) -> bool:
    """Whether what selections saw can be asked again: the first stream drew their noise for survivors alone."""
    return classifier.deterministic or run.settings["stream"] == runs.STREAMS[0]


def _selectable(run: Run) -> Run:
    """The run with the clean image as the strongest attack where a row names none, which is a fault of its own."""
    rows = [row if _names_strongest(row) else {**row, "strongest": 0} for row in run.rows]
    return replace(run, rows=rows)


def _other_selections(rows: list[dict], again: list[tuple[list, list]]) -> list[str]:
    """Images of whose clean image or stored perturbation a selection was told something else than its row says."""
    faults = []
    for row, (first, last) in zip(rows, again, strict=True):
        if not _names_strongest(row):
            continue
        pairs = (("the clean image", first, 0), ("what is stored", last, row["strongest"]))
        for name, now, place in pairs:
            claimed = row["attacks"][place]
            if claimed is None or not _alike(now, claimed):
                faults.append(
                    f"image {row['index']}: the selection of {name} has hits and margin {now[0]}, {now[1]:.4g}, the row says "
                    f"{claimed}."
                )
                break
    return faults


def _alike(now: list, claimed: list) -> bool:
    return now[0] == claimed[0] and abs(now[1] - claimed[1]) <= MARGIN * (1 + abs(now[1]))


def _lucky(run: Run, again: _Again, state: Verification) -> list[str]:
    """Numbers that chance does not give to whoever has not chosen the noise."""
    draws = run.settings["draws"]
    faults = []
    for name, now in (("clean", again.clean), ("under attack", again.hits)):
        claimed = [row["clean"] if name == "clean" else row["hits"] for row in run.rows]
        if any(hit is None or not 0 <= hit <= draws for hit in claimed):
            continue  # each a fault of its own
        mean = (sum(claimed), sum(now), draws * len(now))
        worst = (
            sum(hit == draws for hit in claimed),
            sum(hit == draws for hit in now),
            len(now),
        )
        parts = _shares(claimed, now, draws)
        always = [np.array([1 - part[-1], part[-1]]) for part in parts]
        for statistic, counts, laws in (
            (f"mean of {draws} draws", mean, parts),
            (f"worst of {draws} draws", worst, always),
        ):
            state.judged[f"{name}, {statistic}"] = list(counts)
            chance = two_sided(counts[0], laws)
            if chance < ALPHA:
                faults.append(
                    f"{name}, {statistic}: the claim says {counts[0]} of {counts[2]}, {FRESH} it is {counts[1]}; so much luck "
                    f"has a chance of {chance:.2g}: its noise was chosen, or is not new."
                )
    return faults


def _shares(claimed: list[int], again: list[int], draws: int) -> list[np.ndarray]:
    """The law of each image's claimed hits, given its hits in both judgements together.

    Formula     hypergeometric: of 2 m draws, of which h + h' are right, m are the claim's
    Shapes      N hits twice -> N arrays of m + 1 probabilities
    """
    counts = np.arange(draws + 1)
    laws = {
        total: stats.hypergeom.pmf(counts, 2 * draws, total, draws)
        for total in {one + other for one, other in zip(claimed, again, strict=True)}
    }
    return [laws[one + other] for one, other in zip(claimed, again, strict=True)]


def two_sided(count: int, laws: Sequence[np.ndarray]) -> float:
    """The chance of a sum of independent counts at least as far out as `count`: twice that of its side.

    Shapes      laws: arrays of probabilities of 0, 1, 2, ...
    """
    whole = np.ones(1)
    for law in laws:
        whole = np.convolve(whole, law)
    below = float(whole[: count + 1].sum())
    above = float(whole[count:].sum())
    return min(1.0, 2 * min(below, above))


# ---------------------------------------------------------------------------------------------------------------------
# Attacked again


@dataclass(frozen=True)
class _Group:
    """Survivors of one kind, those of them that are attacked again, and how many fell."""

    what: str
    survivors: list[int]
    asked: list[int]
    fallen: int = 0


def _groups(run: Run, seed: int, reattack: int) -> list[_Group]:
    """Up to `reattack` survivors whose perturbation is nothing, and as many of the others, by chance.

    Why         a success that was thrown away leaves no trace but a survivor that no attack has moved
    Randomness  (seed, kind of survivor)
    """
    draws = run.settings["draws"]
    survivors = [i for i, row in enumerate(run.rows) if 2 * row["hits"] > draws]
    untouched = [i for i in survivors if not bool(run.deltas[i].any())]
    others = sorted(set(survivors) - set(untouched))
    groups = []
    for what, members in (("left untouched by its attacks", untouched), ("attacked", others)):
        order = torch.randperm(len(members), generator=generator_of(seed, "sample", what)).tolist()
        asked = sorted(members[i] for i in order[:reattack])
        if asked:
            groups.append(_Group(what, members, asked))
    return groups


def _attacked(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    run: Run,
    protocol: Protocol,
    again: _Again,
    reattack: int,
    state: Verification,
) -> Iterator[Verification]:
    """Attack a sample of the survivors by the protocol's own attacks; what falls is new, too much of it is a fault."""
    bound = next(r for r in records_of(run) if r.attack and not r.part and r.statistic != "worst")
    possible = (bound.value - bound.low) * len(run.rows)
    seed = seed_of(state.seed, "verify attacks")
    groups = _groups(run, state.seed, reattack)
    asked = [i for group in groups for i in group.asked]
    if not asked:
        return
    kept = torch.tensor(asked)
    last = run
    for last in runs.attacked_afresh(classifier, images[kept], labels[kept], protocol, seed):
        state.note = f"attacked again: {len(last.rows)} of {len(kept)} survivors"
        yield state
    state.attacked = len(asked)
    state.new = _new(run, last, asked, again, state.seed)
    fallen = {entry["index"] for entry in state.new}
    for group in groups:
        counted = replace(group, fallen=len(fallen & set(group.asked)))
        state.established.append(_sampled(counted))
        state.faults += _too_many(counted, bound, possible)


def _new(run: Run, last: Run, asked: list[int], again: _Again, seed: int) -> list[dict]:
    """The survivors whom a new perturbation leaves no more than half of the draws, and surely fewer than the stored one."""
    draws = run.settings["draws"]
    names = ["the clean image", *map(str, last.protocol.runs())]
    listed = []
    for i, row, delta in zip(asked, last.rows, last.deltas, strict=True):
        claimed = run.rows[i]["hits"]
        if 2 * row["hits"] > draws or not _surely_fewer(
            row["hits"], claimed + again.hits[i], draws
        ):
            continue
        listed.append(
            dict(
                index=run.rows[i]["index"],
                label=run.rows[i]["label"],
                claimed=claimed,
                hits=row["hits"],
                draws=draws,
                attack=names[row["strongest"]],
                protocol=last.protocol.key,
                norm=last.protocol.norm,
                epsilon=last.protocol.epsilon,
                seed=seed,
                shape=list(delta.shape),
                delta=[float(value) for value in delta.flatten()],
            )
        )
    return listed


def _surely_fewer(hits: int, before: int, draws: int) -> bool:
    """Whether `hits` of `draws` are fewer than `before` of twice as many, and not by chance (Fisher's exact test)."""
    if draws == 1:
        return hits == 0
    return float(stats.hypergeom.cdf(hits, 3 * draws, hits + before, draws)) < CHANGED


def _sampled(group: _Group) -> str:
    """What attacking a sample again says of all survivors of its kind."""
    count = len(group.asked)
    most = intervals.upper_bound(group.fallen, count, 0.05) if count < len(group.survivors) else 0
    bound = f"; of all {len(group.survivors)}, at most {most:.0%} would (95 %)" if most else ""
    return f"{group.fallen} of {count} survivors that were {group.what} fell to new runs of the same attacks{bound}"


def _too_many(group: _Group, bound: Record, possible: float) -> list[str]:
    """More falls than the interval of the claim leaves a chance.

    Formula     P(K >= k) for K binomial of the sample and p = n (value - low) / survivors: were all that the interval
                gives away among these survivors, this is the share that would fall
    """
    share = min(1.0, possible / len(group.survivors))
    chance = float(stats.binom.sf(group.fallen - 1, len(group.asked), share))
    if group.fallen == 0 or chance >= ALPHA:
        return []
    return [
        f"{group.fallen} of {len(group.asked)} survivors that were {group.what} fell to new runs of the same attacks: were the "
        f"true accuracy under attack within the claim's interval (at least {bound.low:.1%}), that has a chance of "
        f"{chance:.2g}; successes are missing, or these attacks were not run."
    ]


def words_of(new: dict) -> str:
    """In words, what a verification has learned of one image."""
    return (
        f"image {new['index']}: {new['attack']} leaves {new['hits']} of {new['draws']} draws right, where the record says "
        f"{new['claimed']}."
    )


def keep_new(folder: Path, new: Sequence[dict]) -> None:
    """Add what a verification has learned to the folder of a run, a line for each image."""
    path = folder / NEW
    before = path.read_text() if path.exists() else ""
    lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in new]
    files.write(path, before + "".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# In words


def _conclude(classifier: Classifier, run: Run, reattack: int, state: Verification) -> None:
    """What the verification has established, and what it has not."""
    protocol = run.protocol
    single = protocol.name == "single"
    if not state.faults:
        listed = [
            f"an upper bound: the stored perturbations, within {protocol.norm} {protocol.epsilon:.6g}, fool {run.settings['classifier']} as "
            "often as the records say; no accuracy under attack above them can be claimed",
            f"all {state.images} images, clean and perturbed, got the same answers again with the noise of the record",
        ]
        if not classifier.deterministic:
            told = "; ".join(
                f"{name}: {now} of {total}, claimed {claimed}"
                for name, (claimed, now, total) in state.judged.items()
            )
            listed.append(f"{FRESH} (seed {state.seed}) the answers agree but for chance: {told}")
        state.established = listed + state.established
    state.open.append("a lower bound: an attack that is not in this list may fool more of them")
    if single:
        state.open.append("what other attacks find: it is one attack alone")
    if not classifier.deterministic and not _repeats_selections(classifier, run):
        state.open.append(
            "what the selection among attacks saw: its noise cannot be drawn again in this stream"
        )
    state.open.append("that every attack was run as listed: only the strongest result is stored")
    if not state.attacked:
        why = "none was asked for" if not reattack else "a claim that has faults is not attacked"
        if not state.faults and reattack:
            why = "there are none"
        state.open.append(f"that survivors would stand the same attacks again: {why}")
