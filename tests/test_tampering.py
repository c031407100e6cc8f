"""Tamperings with a claim: every one is caught with its sentence, or listed as harmless with the reason."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from diffclass import zoo
from diffclass.classifiers.base import Classifier
from diffclass.data.worlds import world_of
from diffclass.evaluation import claims, protocols, runs, tables, verification
from diffclass.evaluation.protocols import Attack
from safetensors.torch import load_file, save_file
from torch import nn

SHAPE = (1, 2, 2)
IMAGES = 80
BUDGET = 0.15
SEED = 1  # of the verification
OWN = dict(world="toy", classifier="toy", checkpoints={"toy.safetensors": "ab" * 32}, version="0")
PAPER = "madry"


class Linear(Classifier):
    """Logits W x + b."""

    num_classes = 3
    image_shape = SHAPE
    calls = 1
    noise = 0.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))

    def logits(self, x, noise):
        return (x.flatten(1) - 0.5) @ self.weight.T


class Noisy(Linear):
    """The same with a little noise on the logits."""

    def sample_noise(self, images, generator):
        return torch.randn((images, 3), generator=generator)

    def logits(self, x, noise):
        return super().logits(x, ()) + 0.15 * noise


MODELS = {"plain": Linear, "noisy": Noisy, "one step": Linear}


def pictures():
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, Linear()(x).argmax(1)


def protocol_of(base: str):
    """What a base ran: a protocol of few steps, the honest one, or one step that will be sold for more."""
    if base == "one step":
        return protocols.single(Attack("margin", 1, "fgsm", fresh=False), "linf", BUDGET)
    if base == "plain":
        return protocols.paper(PAPER, "linf", BUDGET, classes=3)
    return protocols.named("honest", 1, MODELS[base](), PAPER, "linf", BUDGET)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of honest claims, each made once."""
    folders = {}
    for base, model in MODELS.items():
        folders[base] = tmp_path_factory.mktemp("base") / "run"
        for _ in runs.run(model(), *pictures(), protocol_of(base), folders[base], OWN):
            pass
        claims.keep(folders[base], claims.records_of(runs.read(folders[base])))
    (folders["digits"],) = (f for f in tables.folders("digits") if f.name == "cnn-paper-linf")
    return folders


class Store:
    """The files of a claim in memory, to be changed and written again."""

    def __init__(self, folder: Path, base: str):
        self.folder = folder
        self.base = base
        self.settings = json.loads((folder / "settings.json").read_text())
        self.rows = [json.loads(line) for line in (folder / runs.ROWS).read_text().splitlines()]
        self.deltas = load_file(folder / "deltas-0.safetensors")["deltas"]
        self.records = [asdict(record) for record in claims.kept(folder)]

    def pictures(self, count=None):
        if self.base == "digits":
            return world_of("digits").test(count or len(self.rows))
        return pictures()

    def model(self):
        if self.base == "digits":
            return zoo.classifier("digits", self.settings["classifier"])
        return MODELS[self.base]()

    def run(self) -> runs.Run:
        return runs.Run(self.settings, self.rows, self.deltas.float())

    def save(self, regenerated: bool) -> None:
        """Write all files; the records follow from the forged rows, unless they were forged themselves."""
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        lines = [json.dumps(row) + "\n" for row in self.rows]
        (self.folder / runs.ROWS).write_text("".join(lines))
        save_file({"deltas": self.deltas.contiguous()}, self.folder / "deltas-0.safetensors")
        if regenerated:
            try:
                claims.keep(self.folder, claims.records_of(runs.read(self.folder)))
            except ValueError:
                pass  # whoever forges these has no records to show
        else:
            lines = [json.dumps(record) + "\n" for record in self.records]
            (self.folder / claims.FILE).write_text("".join(lines))

    def survivors(self):
        return [i for i, row in enumerate(self.rows) if 2 * row["hits"] > self.settings["draws"]]

    def fallen(self):
        return [i for i, row in enumerate(self.rows) if row["hits"] == 0 and row["clean"]]

    def forget(self, i: int) -> None:
        """Say of an image that all attacks were run and none did anything."""
        row = self.rows[i]
        first = row["attacks"][0]
        listed = self.run().protocol.runs()
        row["attacks"] = [list(first) for _ in range(1 + len(listed))]
        row["strongest"] = 0
        row["hits"] = row["clean"]
        row["calls"] = runs.calls_of(row, self.run().protocol, self.settings["draws"])
        self.deltas[i] = 0

    def rescore(self) -> None:
        """The counts that the classifier really gives for what is stored, under the noise of the settings."""
        again = list(runs.rejudged(self.model(), *self.pictures(), self.run()))
        clean = [hit for block, _ in again for hit in block]
        hits = [hit for _, block in again for hit in block]
        for row, one, other in zip(self.rows, clean, hits, strict=True):
            row["clean"] = one
            row["hits"] = other

    def reselect(self) -> None:
        """The same for what the selections were told of the clean image and of what is stored."""
        again = runs.reselected(self.model(), *self.pictures(), self.run())
        for row, (first, last) in zip(
            self.rows, [p for block in again for p in block], strict=True
        ):
            row["attacks"][0] = first
            row["attacks"][row["strongest"]] = last


@dataclass(frozen=True)
class Tampering:
    """One way to forge a claim, and the sentence that it is caught by, or the reason why it is harmless."""

    change: Callable[[Store], None]
    said: str | None
    base: str = "plain"
    regenerated: bool = True
    reattack: int = 0
    harmless: str = ""


TAMPERINGS: dict[str, Tampering] = {}


def tampering(said, base="plain", **options):
    """Enter a function into the table; its name is that of the tampering."""

    def entered(change):
        TAMPERINGS[change.__name__] = Tampering(change, said, base, **options)
        return change

    return entered


def harmless(reason, base="plain", **options):
    return tampering(None, base, harmless=reason, **options)


MISSING = "successes are missing, or these attacks were not run"
UNFOLLOWED = "does not follow from the rows"

# ---------------------------------------------------------------------------------------------------------------------
# Counts and labels


@tampering("image 3: the label is")
def a_label_is_changed(store):
    store.rows[3]["label"] = (store.rows[3]["label"] + 1) % 3


@tampering("perturbed, 0 of 1 draws are right, not 1")
def a_fooled_image_becomes_right(store):
    store.rows[store.fallen()[0]]["hits"] = 1


@tampering("of 10 draws are right, not", "noisy")
def one_draw_more_is_right(store):
    row = next(row for row in store.rows if 0 < row["hits"] < 10)
    row["hits"] += 1


@tampering("clean, 0 of 1 draws are right, not 1", "digits")
def a_clean_miss_becomes_a_hit(store):
    next(row for row in store.rows if row["clean"] == 0)["clean"] = 1


@tampering("a count of hits is not between 0 and 10", "noisy")
def more_hits_than_draws(store):
    store.rows[0]["hits"] = 11


@tampering("is not the row of image 5")
def a_count_is_a_boolean(store):
    store.rows[5]["hits"] = True


@tampering("is not the row of image 5")
def a_margin_is_not_finite(store):
    store.rows[5]["attacks"][0][1] = float("nan")


@tampering("the selection of the clean image has hits and margin")
def a_margin_is_another(store):
    store.rows[5]["attacks"][0][1] -= 5


# ---------------------------------------------------------------------------------------------------------------------
# Which images


@tampering("but has 80 rows")
def more_images_than_rows(store):
    store.settings["n"] = 4000


@tampering("only 80 of the 160 images of the claim could be asked about")
def rows_and_perturbations_are_doubled(store):
    copies = [{**copy.deepcopy(row), "index": row["index"] + IMAGES} for row in store.rows]
    store.rows += copies
    store.deltas = torch.cat([store.deltas, store.deltas])
    store.settings["n"] = 2 * IMAGES


@tampering("but digits has 400 for 401 rows", "digits")
def one_row_more_than_there_are_images(store):
    """Once this switched every question off: 0 of 401 images were asked about."""
    store.rows.append(dict(copy.deepcopy(store.rows[-1]), index=len(store.rows)))
    store.settings["n"] = len(store.rows)
    store.deltas = torch.zeros(len(store.rows), *store.deltas.shape[1:]).half()
    for row in store.rows:
        row["clean"] = row["hits"] = 1
        row["attacks"] = [[1, -9.0] for _ in row["attacks"]]
        row["strongest"] = 0


@tampering("is not the row of image 4")
def a_row_is_there_twice(store):
    store.rows.insert(4, copy.deepcopy(store.rows[3]))


@tampering("is not the row of image 4")
def a_row_is_taken_out(store):
    del store.rows[4]


@tampering("the claim is about 80 images, but has 79 rows")
def the_last_image_is_taken_out(store):
    del store.rows[-1]
    store.deltas = store.deltas[:-1]


def cut(store, count):
    store.rows = store.rows[:count]
    store.deltas = store.deltas[:count]
    store.settings["n"] = count
    store.settings["images"] = runs.fingerprint(*store.pictures(count))


def share(store, count):
    return sum(row["hits"] for row in store.rows[:count]) / count


@tampering("so that nobody stops where luck is best", "digits")
def the_luckiest_prefix_is_kept(store):
    odd = [count for count in range(20, 400) if count % 8 and count % 50]
    cut(store, max(odd, key=lambda count: share(store, count)))


@harmless(
    "of the few round numbers one is the luckiest; its interval is that of fewer images, and the number is in words",
    "digits",
)
def the_luckiest_round_prefix_is_kept(store):
    cut(store, max(range(64, 400, 64), key=lambda count: share(store, count)))


@tampering("the images or labels are not those of the claim")
def the_hash_of_the_images_is_changed(store):
    store.settings["images"] = "0" * 64


@tampering("the world is called 'digits', the claim is about 'Digits'", "digits")
def the_world_has_another_name(store):
    store.settings["world"] = "Digits"


@tampering("weights digits-cnn.safetensors: the claim is about", "digits")
def the_store_is_sold_as_that_of_another_classifier(store):
    store.settings["classifier"] = "adversarial"


@tampering("draws are right, not", "digits")
def another_classifier_with_its_own_weights(store):
    store.settings["classifier"] = "adversarial"
    store.settings["checkpoints"] = zoo.checkpoints("digits", "adversarial")


@tampering("weights toy.safetensors: the claim is about 000000000000, these are abababababab")
def the_hash_of_the_weights_is_changed(store):
    store.settings["checkpoints"]["toy.safetensors"] = "0" * 64


# ---------------------------------------------------------------------------------------------------------------------
# The budget and the perturbations


@tampering("more than the budget 0.075")
def the_budget_is_halved(store):
    store.settings["protocol"]["epsilon"] = BUDGET / 2


@tampering("attacks of paper-madry-1 use all of it, so this is not the budget that they had")
def the_budget_is_doubled(store):
    store.settings["protocol"]["epsilon"] = 2 * BUDGET


@tampering(MISSING, reattack=30)
def the_budget_is_doubled_and_one_perturbation_uses_it(store):
    store.settings["protocol"]["epsilon"] = 2 * BUDGET
    x, _ = pictures()
    fooled = next(
        i for i in store.fallen() if bool(((x[i] + 1.9 * store.deltas[i].float()) % 1 > 0).all())
    )
    store.deltas[fooled] = runs.storable(1.98 * store.deltas[fooled].float()).half()
    store.deltas[fooled] = store.deltas[fooled].clamp(-x[fooled].half(), 1 - x[fooled].half())
    store.reselect()


@tampering("more than the budget 0.15")
def the_norm_is_another(store):
    store.settings["protocol"]["norm"] = "l2"


@tampering("expected a norm of linf, l2, flow, got 'l0'")
def the_norm_does_not_exist(store):
    store.settings["protocol"]["norm"] = "l0"


@tampering("expected an attack budget >= 0, got -0.15")
def the_budget_is_negative(store):
    store.settings["protocol"]["epsilon"] = -BUDGET


@tampering("image 5: the perturbation's linf size is 0.1510")
def a_perturbation_is_a_little_larger(store):
    x, _ = pictures()
    store.deltas[5] = (0.151 * (0.5 - x[5]).sign()).half()


@tampering("the perturbed image leaves [0,1]")
def a_perturbed_image_leaves_the_pixels(store):
    x, _ = pictures()
    i = int(x.flatten(1).amax(1).argmax())
    store.deltas[i] = BUDGET * 0.999


@tampering("holds numbers of type float64; what is stored, and judged, is float16")
def perturbations_in_double_precision(store):
    store.deltas = store.deltas.double()


@harmless("a millionth of the budget is what rounding leaves of it; older runs store 32 bits")
def perturbations_a_hair_above_the_budget(store):
    store.deltas = store.deltas.float() * (1 + 1e-6)


@tampering("the perturbation's linf size is nan")
def a_perturbation_is_not_a_number(store):
    store.deltas[0] = float("nan")


@tampering("the perturbation's linf size is inf")
def a_perturbation_is_infinite(store):
    store.deltas[0] = float("inf")


@tampering("the perturbations are of shape [1, 4, 1], but [1, 2, 2] for these images")
def perturbations_of_another_shape(store):
    store.deltas = store.deltas.reshape(-1, 1, 4, 1)


@tampering("draws are right, not")
def perturbations_of_fooled_and_surviving_images_are_swapped(store):
    i = store.fallen()[0]
    label = store.rows[i]["label"]
    j = next(j for j in store.survivors() if store.rows[j]["label"] != label)
    store.deltas[[i, j]] = store.deltas[[j, i]]


@tampering("the selection of what is stored has hits and margin")
def perturbations_of_the_survivors_are_those_of_others(store):
    kept = store.survivors()
    x, _ = pictures()
    rolled = store.deltas[kept].roll(1, 0)
    store.deltas[kept] = rolled.clamp(-x[kept].half(), 1 - x[kept].half())


@tampering("the selection of what is stored has hits and margin")
def perturbations_of_the_survivors_are_nothing(store):
    store.deltas[store.survivors()] = 0


@tampering("no attack was stronger than the clean image, but it is perturbed")
def a_perturbed_image_is_called_clean(store):
    i = store.survivors()[0]
    store.rows[i]["attacks"] = [store.rows[i]["attacks"][0] for _ in store.rows[i]["attacks"]]
    store.rows[i]["strongest"] = 0


def shard(store, name):
    store.save(True)
    save_file({"deltas": store.deltas[:3].contiguous()}, store.folder / name)


@tampering("there are 83 perturbations and 80 rows")
def one_file_of_perturbations_more(store):
    shard(store, "deltas-1.safetensors")


@tampering("the files of perturbations are")
def a_gap_between_files_of_perturbations(store):
    shard(store, "deltas-7.safetensors")


@tampering("expected files deltas-NUMBER.safetensors")
def a_file_of_perturbations_without_a_number(store):
    shard(store, "deltas-best.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Attacks and protocols


@tampering(MISSING, reattack=16)
def every_second_success_is_thrown_away(store):
    for i in store.fallen()[::2]:
        store.forget(i)


@tampering(MISSING, reattack=8)
def no_attack_was_run(store):
    for i in range(len(store.rows)):
        store.forget(i)


@tampering(MISSING, "noisy", reattack=16)
def no_attack_was_run_on_a_random_classifier(store):
    for i in range(len(store.rows)):
        store.forget(i)
    store.rescore()


@tampering("the protocol is not what honest-1 is here: attacks differ", "one step")
def one_step_sold_as_honest(store):
    store.settings["protocol"] |= dict(name="honest", version=1)


@tampering(MISSING, "one step", reattack=40)
def one_step_sold_as_twenty_and_its_successes_halved(store):
    """Everything in the folder agrees with twenty steps of the paper's attack; only new attacks can tell."""
    twenty = protocol_of("plain")
    store.settings["protocol"] = twenty.as_json()
    for row in store.rows:
        row["calls"] = runs.calls_of(row, twenty, 1)
    for i in store.fallen()[::2]:
        store.forget(i)


@tampering("the protocol is not what paper-madry-1 is here: attacks differ")
def steps_are_inflated(store):
    for attack in store.settings["protocol"]["attacks"]:
        attack["steps"] = 1000


@tampering("its attacks take")
def restarts_are_inflated_by_copies(store):
    """The protocol says two restarts more, and every row has their entries."""
    attack = store.settings["protocol"]["attacks"][-1]
    attack["restarts"] += 2
    for row in store.rows:
        row["attacks"] += [row["attacks"][-1]] * 2


@tampering("the protocol is not what honest-1 is here: attacks differ", "noisy")
def the_step_size_is_another(store):
    store.settings["protocol"]["attacks"][0]["step"] = 0.01


@tampering("the protocol is not what honest-1 is here: attacks differ", "noisy")
def averaged_draws_are_inflated(store):
    store.settings["protocol"]["attacks"][0]["draws"] = 20


@tampering("this library cannot judge by it")
def a_protocol_of_another_paper(store):
    store.settings["protocol"]["name"] = "paper-rdc"


@tampering("got honest-9; this library cannot judge by it", "noisy")
def a_version_that_does_not_exist(store):
    store.settings["protocol"]["version"] = 9


@tampering("the protocol is not what honest-2 is here: attacks differ", "noisy")
def an_older_version_sold_as_the_newer(store):
    store.settings["protocol"]["version"] = 2


@tampering("was left out", "noisy")
def an_attack_is_left_out(store):
    store.rows[store.survivors()[0]]["attacks"][3] = None


@tampering("was not needed, but is there", "noisy")
def an_attack_after_the_image_fell(store):
    row = next(row for row in store.rows if row["attacks"][-1] is None)
    row["attacks"][-1] = [1, -1.0]


@tampering("expected 4 entries of attacks in the row of image", "noisy")
def an_entry_of_an_attack_is_missing(store):
    store.rows[store.survivors()[0]]["attacks"].pop()


@tampering("is not its strongest attack")
def a_weaker_attack_is_called_the_strongest(store):
    row = store.rows[next(i for i in store.survivors() if store.rows[i]["strongest"] != 0)]
    row["strongest"] = 0


@tampering("calls, its attacks take")
def calls_are_divided_by_a_hundred(store):
    for row in store.rows:
        row["calls"] //= 100


@tampering("calls, its attacks take")
def one_call_too_few(store):
    store.rows[0]["calls"] -= 1


# ---------------------------------------------------------------------------------------------------------------------
# Noise


@tampering("the claim is about 1 draws, its protocol asks for 10", "noisy")
def one_draw_in_place_of_ten(store):
    store.settings["draws"] = 1
    for row in store.rows:
        row["clean"] = int(row["clean"] > 0)
        row["hits"] = int(row["hits"] > 0)
        row["attacks"] = [e and [int(e[0] > 0), e[1]] for e in row["attacks"]]


@tampering("the claim is about 1 draws, its protocol asks for 10", "noisy")
def one_draw_in_place_of_ten_rescored(store):
    one_draw_in_place_of_ten(store)
    store.rescore()
    store.reselect()


@tampering("the protocol is not what honest-1 is here: draws differ", "noisy")
def one_draw_in_the_protocol_too(store):
    store.settings["protocol"]["draws"] = 1
    one_draw_in_place_of_ten_rescored(store)


def luckiest(store, seeds):
    best = None
    for seed in seeds:
        store.settings["seed"] = seed
        store.rescore()
        total = sum(row["hits"] for row in store.rows)
        if best is None or total > best[0]:
            best = (total, seed)
    store.settings["seed"] = best[1]
    store.rescore()


@tampering("the selection of the clean image has hits and margin", "noisy")
def the_luckiest_of_twelve_seeds(store):
    luckiest(store, range(12, 24))


@harmless("a classifier without noise answers the same by any seed; that it was chosen is in words")
def another_seed_of_a_deterministic_classifier(store):
    store.settings["seed"] = 77


@tampering("of 10 draws are right, not", "noisy")
def another_stream_of_noise(store):
    store.settings["stream"] = "batches of 64"


# ---------------------------------------------------------------------------------------------------------------------
# Settings and records


@tampering("the settings have ['certified'], which no run has")
def a_setting_more(store):
    store.settings["certified"] = True


@tampering("expected draws in")
def draws_without_end(store):
    store.settings["draws"] = 10**9


@harmless("the version of the library is a note; everything is judged by today's")
def another_version_of_the_library(store):
    store.settings["version"] = "9.9"


@tampering(UNFOLLOWED, regenerated=False)
def the_value_of_a_record(store):
    record = store.records[1]
    record["value"] = (round(record["value"] * IMAGES) + 1) / IMAGES


@tampering(UNFOLLOWED, regenerated=False)
def a_record_of_ten_times_as_many_images(store):
    store.records[1]["n"] *= 10


@tampering(UNFOLLOWED, regenerated=False)
def the_unit_of_a_record(store):
    store.records[1]["unit"] = "certified"


@tampering(UNFOLLOWED, regenerated=False)
def the_source_of_a_record(store):
    store.records[1]["source"] = "RobustBench, external evaluation"


@tampering(UNFOLLOWED, regenerated=False)
def the_words_of_a_record(store):
    store.records[1]["detail"] = "certified"


@tampering(UNFOLLOWED, "one step", regenerated=False)
def a_record_of_a_single_attack_named_honest(store):
    for record in store.records:
        record["attack"] = record["attack"] and "honest-1"


@tampering(UNFOLLOWED, regenerated=False)
def a_record_twice_by_somebody_else(store):
    store.records.append({**store.records[1], "source": "independent replication"})


@tampering("is there more than once", regenerated=False)
def a_record_twice(store):
    store.records.append(store.records[1])


@tampering("is missing", regenerated=False)
def the_record_under_attack_is_taken_out(store):
    del store.records[1]


@harmless("when a number was written says nothing about it", regenerated=False)
def the_time_of_a_record(store):
    store.records[1]["when"] = "2020-01-01T00:00:00+00:00"


@harmless(
    "perturbations of attacks that are not the strongest are not stored; the bound does not depend on them",
    "noisy",
)
def a_weaker_attack_is_made_to_look_weaker(store):
    for row in store.rows:
        for place, entry in enumerate(row["attacks"]):
            if entry and place not in (0, row["strongest"]) and entry[0] > 0:
                entry[0] = min(10, entry[0] + 1)
                entry[1] -= 0.01


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def verified(folder: Path, base: str, reattack: int):
    """The result of a verification, or the sentence of what could not be read."""
    try:
        run = runs.read(folder)
        claimed = claims.kept(folder)
    except ValueError as error:
        return None, [str(error)]
    if base == "digits":
        world = world_of(run.settings["world"])
        name = run.settings["classifier"]
        images, labels = world.test(len(run.rows))
        model = zoo.classifier("digits", name)
        checkpoints = zoo.checkpoints("digits", name)
    else:
        world = None
        images, labels = pictures()
        model = MODELS[base]()
        checkpoints = OWN["checkpoints"]
    options = dict(world=world, seed=SEED, reattack=reattack)
    *_, state = verification.verify(
        model, images, labels, run, checkpoints, claimed, PAPER, **options
    )
    return state, state.faults


@pytest.mark.parametrize("base", [*MODELS, "digits"])
def test_what_nobody_touched_stands(bases, base):
    state, faults = verified(bases[base], base, 8)
    assert faults == [] and state.images == state.total and state.attacked >= 1


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_caught_or_harmless(bases, tmp_path, name):
    one = TAMPERINGS[name]
    store = Store(shutil.copytree(bases[one.base], tmp_path / "run"), one.base)
    one.change(store)
    store.save(one.regenerated)
    state, faults = verified(store.folder, one.base, one.reattack)
    if one.harmless:
        assert faults == [] and state.images == state.total
    else:
        assert any(one.said in fault for fault in faults), faults[:5]


def test_there_are_enough_of_them():
    caught = [one for one in TAMPERINGS.values() if not one.harmless]
    assert len(caught) >= 60 and len(TAMPERINGS) - len(caught) <= 6
