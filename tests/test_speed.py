"""How fast a network is trained: FLOP, the share of a measured peak, steps that can be replayed, memory that runs out."""

import os
from dataclasses import replace

import pytest
import test_train
import test_training
import torch
from diffclass import device
from diffclass.classifiers.base import Noise, each, parts, take
from diffclass.data.worlds import SHAPES
from diffclass.denoisers import network
from diffclass.training import loop, losses, optimisers, speed
from diffclass.training.loop import Training
from diffclass.training.optimisers import Muon, Optimiser
from diffclass.training.recipes import RECIPES, Beginning
from diffclass.zoo import networks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

CIFAR = (3, 32, 32)
TEACHER = networks.MODELS["cifar10"]["teacher"]
STUDENT = networks.MODELS["cifar10"]["student"]
CONTRASTIVE = networks.CONTRASTIVE["cifar10"]


def untrained(name, given=None):
    return RECIPES[name].build(Beginning(CIFAR, 10, given=given)).eval()


def counted(call) -> int:
    """FLOP of a call by torch's own counter, attention written out as matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def forward_flops(denoiser, classes=None) -> int:
    """FLOP of denoising one picture."""
    with torch.no_grad():
        return counted(lambda: denoiser(torch.zeros(1, *CIFAR), 1.0, classes))


def gradient_flops(denoiser) -> int:
    """FLOP of denoising one picture under all classes and none, and of the gradient of the weights."""
    return counted(lambda: denoiser(torch.zeros(1, *CIFAR), 1.0, range(11)).sum().backward())


def test_the_student_is_small_and_the_count_of_flops_is_torch_s():
    teacher = untrained(TEACHER)
    student = untrained(STUDENT, teacher)
    assert forward_flops(student) <= 1e9
    own = gradient_flops(student)
    assert speed.step_flops(STUDENT) == own + forward_flops(teacher, range(11))


@pytest.mark.parametrize("name", [TEACHER, CONTRASTIVE])
def test_a_step_costs_three_forwards_but_for_the_gradient_of_the_picture(name):
    denoiser = untrained(name)
    forward = forward_flops(denoiser, None if denoiser.one_call else [0])
    assert 2.9 * forward < speed.step_flops(name) < 3 * forward


def test_an_attack_inside_is_counted_along():
    """Two steps of the attack and the images before and after, at two levels each."""
    levels = 2
    forward = forward_flops(untrained(CONTRASTIVE))
    step = speed.step_flops(networks.HARDENED["cifar10"])
    assert 4 * levels * 2 * forward < step < 4 * levels * 4 * forward


def test_other_widths_are_counted():
    assert speed.step_flops(TEACHER, (16, 32)) < 0.1 * speed.step_flops(TEACHER)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("digits")])
def test_every_step_can_be_counted(name):
    assert speed.step_flops(name) > 1e6


def test_the_networks_that_are_counted_are_those_that_are_trained():
    built = network.build(
        "MultiHeadDenoiser", "UNet", 10, CIFAR, widths=(32, 64, 96), layers=2, attention=False
    )
    assert network.describe(untrained(STUDENT, untrained(TEACHER))) == network.describe(built)


def test_speed_is_a_share_of_a_measured_peak():
    speed_of = speed.Speed(images=1000, flops=2e9, peak=8e12)
    assert str(speed_of) == "1,000 images/s, 2 TFLOP/s, 25% of the matrix peak"
    assert 1e8 < speed.matrix_peak("fp32", size=1024, seconds=0.05) < 1e16


# -- a step that can be captured and replayed --------------------------------------------------------------------------

CAPTURED = [
    CONTRASTIVE,
    networks.HARDENED["cifar10"],
    TEACHER,
    STUDENT,
    networks.TRANSLATORS["cifar10"][0],
    networks.TRANSLATORS["digits"][0],
    networks.STUDENT,
]
TINY = {
    CONTRASTIVE: (16,),
    TEACHER: (16, 32),
    STUDENT: (16, 32),
    networks.TRANSLATORS["cifar10"][0]: (32, 32),
    networks.TEACHER: (16,),
    networks.STUDENT: (16,),
}
# What waits for the accelerator: a number or a shape that the host wants to know, a number that it sends.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique",
    "lift_fresh",
)


class Watch(TorchDispatchMode):
    """Writes down every operation with what is no tensor of it: a captured step replays these, whatever Python says."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and write it down."""
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        plain = [a for a in flat if not isinstance(a, torch.Tensor | torch.Generator)]
        masks = sum(isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in flat)
        if not str(function).startswith("profiler"):  # which numbers its own visits
            masked = masks if "index" in str(function) else 0
            self.seen.append((str(function), str(plain), masked))
        return function(*args, **(kwargs or {}))

    @property
    def reads(self) -> list[str]:
        """What would wait for the accelerator, indices by booleans included, whose number is not known before."""
        return [name for name, _, masks in self.seen if masks or name.split(".")[1] in READS]


def prepared(name: str, **options) -> Training:
    """A short run of a recipe at tiny size, on pictures of noise."""
    recipe = RECIPES[name]
    shape = SHAPES[recipe.world] if recipe.world == "digits" else (3, 16, 16)
    given = None
    if recipe.needs:
        given = prepared(recipe.needs).denoiser.eval()
    beginning = Beginning(shape, 10, widths=TINY.get(name), given=given)
    images = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))
    options = dict(steps=20, batch=8, rate=recipe.rate, precision="fp32") | options
    built = recipe.build(beginning)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # last layers begin at zero, and would answer nothing
        for weight in built.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return Training(
        built,
        recipe.pictures(images),
        torch.arange(40) % 10,
        loss=recipe.loss(beginning),
        **options,
    )


def watched(run: Training, steps: int) -> list[Watch]:
    """What each of the next steps does after its noise is drawn."""
    found = []
    work = run.work

    def seen(*batch):
        with Watch() as watch:
            loss = work(*batch)
        found.append(watch)
        return loss

    run.work = seen
    for progress in run:
        if progress.step == steps:
            return found


class Scalar(Optimiser):
    """A twin whose rate is a number of Python's, as one would write it first."""

    def __init__(self, network, rate):
        self.parts = [torch.optim.AdamW(network.parameters(), lr=rate)]

    def set_rate(self, rate):
        for group in self.parts[0].param_groups:
            group["lr"] = rate


@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_reads_nothing_back_and_is_the_same_work_every_time(name):
    """The operations of two later steps, with every number in them: what a graph replays is what a plain step does."""
    run = prepared(name)
    assert run.loss.silent
    _, _, one, two = watched(run, 4)
    assert one.reads == two.reads == []
    assert one.seen == two.seen and len(one.seen) > 100


def test_a_rate_that_is_a_number_is_told_from_one_that_can_be_replayed():
    _, _, one, two = watched(prepared(CONTRASTIVE, optimiser=Scalar), 4)
    assert one.seen != two.seen
    reading = losses.Loss(
        lambda network, images, labels, generator: (),
        lambda network, images, labels, noise: (
            network.answers(images, torch.ones(len(images)))[labels > -1].square().mean()
        ),
    )
    run = test_training.run(loss=reading)
    assert watched(run, 1)[0].reads != []


class OnTheCpu(device.Replayed):
    """What `Replayed` does, without a graph: plain calls first, then the same tensors again and again."""

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.kept = []

    def _aside(self, given):
        return self.function(*given)

    def _capture(self, given):
        self.own = [part.clone() for part in given]
        self.graph = self
        self.value = torch.zeros(())

    def replay(self):
        """Run on the tensors that were kept when the step was captured."""
        self.value.copy_(self.function(*self.own))
        self.kept.append([part.data_ptr() for part in self.own])


@pytest.mark.parametrize("optimiser", [Optimiser, Muon])
@pytest.mark.parametrize("name", [CONTRASTIVE, networks.TRANSLATORS["digits"][0]])
def test_a_captured_step_is_the_plain_one_on_tensors_of_its_own(name, optimiser, monkeypatch):
    plain = prepared(name, optimiser=optimiser, steps=7)
    wanted = [progress.loss for progress in plain]
    assert not plain.captures()
    monkeypatch.setattr(device, "replays", lambda place: True)
    monkeypatch.setattr(device, "Replayed", OnTheCpu)
    captured = prepared(name, optimiser=optimiser, steps=7)
    assert captured.captures()
    frames = list(captured)
    assert [progress.loss for progress in frames] == wanted
    assert test_training.equal(plain, captured)
    kept = captured._graph.kept
    assert len(kept) == 7 - device.WARM_CALLS and all(places == kept[0] for places in kept)


class Capturing:
    """A stream of an accelerator that is being captured, as an optimiser of torch asks about it."""

    type = "cuda"

    def is_capturing(self) -> bool:
        return True


def test_torch_lets_the_optimiser_be_captured(monkeypatch):
    """Its own check, which looks only where there is an accelerator: here it is told that there is one."""
    runs = [prepared(CONTRASTIVE, optimiser=kind) for kind in (Optimiser, Scalar)]
    for run in runs:
        next(iter(run))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: Capturing())
    monkeypatch.setattr(torch.accelerator, "current_stream", Capturing)
    runs[0].optimiser.step()
    with pytest.raises(RuntimeError, match="Attempting CUDA graph capture"):
        runs[1].optimiser.step()


def test_one_function_decides_what_is_captured(monkeypatch):
    assert device.replays(torch.device("cuda")) and not device.replays(torch.device("cpu"))
    monkeypatch.setattr(device, "replays", lambda place: True)
    assert prepared(CONTRASTIVE).captures()
    assert not prepared(networks.BASELINES["digits"]["cnn"]).captures(), "its checks read pixels"


# -- memory and precision that are not there ---------------------------------------------------------------------------


def sliced(loss, network_, images, labels, noise: Noise, size: int) -> float:
    """The mean over slices of a batch, each with its part of the noise."""
    total = 0.0
    for start in range(0, len(images), size):
        kept = slice(start, start + size)
        value = loss.value(network_, images[kept], labels[kept], take(noise, kept))
        total += float(value.detach()) * len(images[kept]) / len(images)
    return total


SLICED = [*CAPTURED, *(n for n in RECIPES if n.startswith("digits-") and "0.25" in n)]
SLICED += [networks.HARDENED["digits"], *networks.BASELINES["digits"].values()]


@pytest.mark.parametrize("name", SLICED)
def test_a_batch_is_the_mean_of_its_slices(name):
    """Noise is drawn first and then sliced; a loss of the slice's own noise is another."""
    run = prepared(name)
    run.denoiser.eval()
    generator = torch.Generator().manual_seed(3)
    images, labels = run.images[:8], run.labels[:8]
    noise = run.loss.draw(run.denoiser, images, labels, generator)
    whole = float(run.loss.value(run.denoiser, images, labels, noise).detach())
    for size in (4, 3, 1):
        assert sliced(run.loss, run.denoiser, images, labels, noise, size) == pytest.approx(
            whole, rel=1e-4
        )
    turned = each(lambda part: part.flip(0), noise)
    if next(parts(noise), None) is not None:
        assert sliced(run.loss, run.denoiser, images, labels, turned, 4) != pytest.approx(
            whole, rel=1e-4
        )


def short_of_memory(loss: losses.Loss, most: int) -> losses.Loss:
    """The same loss on a chip that holds so many images."""

    def value(network_, images, labels, noise):
        if len(images) > most:
            raise torch.OutOfMemoryError("no memory for another image")
        return loss.value(network_, images, labels, noise)

    return replace(loss, value=value)


def test_where_memory_runs_out_half_the_images_give_the_same_result():
    plain = test_training.run(batch=16)
    wanted = [progress.loss for progress in plain]
    poor = test_training.run(batch=16, loss=short_of_memory(losses.denoising_loss(), 5))
    with pytest.warns(
        UserWarning, match="memory ran out; going on with . images at once, 16 a"
    ) as said:
        got = [progress.loss for progress in poor]
    assert [int(str(w.message).split(" images")[0].split()[-1]) for w in said] == [8, 4]
    assert got == pytest.approx(wanted, rel=1e-5) and poor.piece == 4
    for name, value in plain.average.named_parameters():
        assert torch.allclose(value, poor.average.get_parameter(name), atol=1e-5)


def test_one_image_that_is_too_many_is_an_error_that_keeps_what_was_done(tmp_path):
    poor = test_training.run(batch=4, loss=short_of_memory(losses.denoising_loss(), 0))
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        next(iter(poor))
    assert poor.piece == 1 and poor.step == 0
    fresh = test_training.tiny()
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in poor.denoiser.state_dict().items())


def test_memory_that_runs_out_in_an_update_is_not_tried_again(monkeypatch, tmp_path):
    """Weights that were changed in part are neither changed twice nor kept."""
    poor = test_training.run(batch=4, checkpoint=tmp_path / "run.safetensors")
    poor.step = 1

    def step():
        raise torch.OutOfMemoryError("no memory for another moment")

    monkeypatch.setattr(poor.optimiser, "step", step)
    with pytest.raises(MemoryError, match="while the weights were changed, which fewer images"):
        next(iter(poor))
    assert poor.piece == 4 and list(tmp_path.iterdir()) == []


def test_an_accelerator_without_bfloat16_takes_fp32_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    place = torch.device("cuda")
    with pytest.warns(UserWarning, match="cuda has no bfloat16; networks run in fp32 there"):
        assert device.available("bf16", place) == "fp32"
    assert device.available("fp32", place) == "fp32"
    assert device.available("bf16", torch.device("cpu")) == "bf16"
    monkeypatch.setattr(device, "available", lambda precision, place: "fp32")
    with device.in_precision("bf16", torch.zeros(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert test_training.run(precision="bf16").precision == "fp32", "what its card says"


@pytest.mark.parametrize("before", [None, "/tmp/torchinductor_reader"])
def test_what_is_compiled_stays_in_the_cache(before, monkeypatch, tmp_path):
    """Whether torch has already named a temporary folder or not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before or "")
    if before is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("DIFFCLASS_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: asked.append(module))
    test_training.run(compiled=True)
    assert len(asked) == 1 and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    test_training.run(compiled=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_compiling_is_not_on_the_clock_of_a_run_by_time_and_changes_no_weight(monkeypatch):
    """Here nothing is compiled, but done as if: one gradient more than steps, before the first."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    plain = losses.denoising_loss()
    asked = []

    def value(*given):
        asked.append(1)
        return plain.value(*given)

    runs = []
    for compiled in (False, True):
        monkeypatch.setattr(loop.time, "perf_counter", test_train.Clock(0.5).perf_counter)
        asked.clear()
        run = test_training.run(
            steps=100, minutes=0.05, compiled=compiled, loss=replace(plain, value=value)
        )
        assert len(list(run)) == 6 and len(asked) == 6 + compiled
        assert run.seconds == pytest.approx(3.0)
        runs.append(run)
    assert test_training.equal(*runs)


# -- Muon -------------------------------------------------------------------------------------------------------------


def stepped(kind, rate: float = 0.01, network_=None, steps: int = 2):
    """A network after some steps along gradients of noise."""
    model = network_ or test_training.tiny("MultiHeadDenoiser")
    optimiser = kind(model, rate)
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight).copy_(
                torch.randn(weight.shape, generator=generator)
            )
        optimiser.set_rate(rate)
        optimiser.step()
    return model


def test_muon_takes_the_hidden_matrices_and_leaves_the_rest_to_adamw():
    before = test_training.tiny("MultiHeadDenoiser").state_dict()
    by_muon = stepped(Muon)
    by_adamw = stepped(Optimiser).state_dict()
    hidden = optimisers.hidden_matrices(by_muon)
    assert set(hidden) == {
        "network.blocks.0.conv1.weight",
        "network.blocks.0.conv2.weight",
        "network.blocks.0.modulate.weight",
    }
    for name, value in by_muon.named_parameters():
        assert torch.equal(value, by_adamw[name]) == (name not in hidden), name
        assert not torch.equal(value, before[name])
    for name in TINY:
        model = prepared(name).denoiser
        taken = optimisers.hidden_matrices(model)
        assert taken and all(weight.ndim in (2, 4) for weight in taken.values())
        ends = ("conv_in", "conv_out", "enter", "leave", "embed")
        assert not any(end in part for part in taken for end in ends)


def test_a_step_of_muon_is_the_orthogonal_matrix_nearest_to_the_gradient():
    """Its first step, against the singular vectors: all directions of a kernel's matrix move alike, to a third."""
    rate = 0.01
    before = test_training.tiny("MultiHeadDenoiser").state_dict()
    model = test_training.tiny("MultiHeadDenoiser")
    stepped(Muon, rate, model, steps=1)
    for name, weight in optimisers.hidden_matrices(model).items():
        change = (before[name] * (1 - 3 * rate * 0.02) - weight.detach()).flatten(1)
        scale = 3 * rate * 0.2 * max(change.shape) ** 0.5
        singular = torch.linalg.svdvals(change / scale)
        assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3, name


def test_muon_does_not_mind_how_kernels_lie_in_memory(tmp_path):
    rows = stepped(Muon)
    last = stepped(
        Muon, network_=test_training.tiny("MultiHeadDenoiser").to(memory_format=torch.channels_last)
    )
    for name, value in rows.named_parameters():
        # its products are in bfloat16, and their sums in another order
        assert torch.allclose(value, last.get_parameter(name), atol=3e-3), name


@pytest.mark.parametrize("kept", [1, 3])
def test_a_run_with_muon_resumes_bit_for_bit(kept, tmp_path):
    whole = test_training.run(optimiser=Muon)
    list(whole)
    first = iter(test_training.run(optimiser=Muon, checkpoint=tmp_path / "run.safetensors"))
    for _ in range(kept):
        next(first)
    first.close()
    second = test_training.run(optimiser=Muon, checkpoint=tmp_path / "run.safetensors")
    list(second)
    assert second.step == 6 and test_training.equal(whole, second)
    with pytest.raises(ValueError, match=r"\['optimiser'\] differ"):
        test_training.run(checkpoint=tmp_path / "run.safetensors")


def test_a_torch_without_muon_gets_a_sentence(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match="expected a torch with torch.optim.Muon, 2.9 or later"):
        Muon(test_training.tiny(), 1e-3)
