"""One training loop, an iterator: progress, plotting and early stopping stay outside, and it resumes to the step.

A denoiser is trained by denoising (`denoising_loss`) or by copying another (`distillation_loss`); other networks bring
a loss of their own. The same loop runs on a CPU, on one accelerator and, under Accelerate, on several: each process
takes its share of every batch.
"""

import contextlib
import copy
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import safetensors
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from diffclass import device
from diffclass.classifiers.base import Noise, each, parts, take
from diffclass.storage import files
from diffclass.storage.weights import check_finite
from diffclass.training.losses import Loss, denoising_loss
from diffclass.training.optimisers import Optimiser
from diffclass.training.schedule import Schedule

DENOISING = denoising_loss()
MOST_FALLS = 10  # how often a run may go back to its last good state


@contextlib.contextmanager
def global_draws_from(generator: torch.Generator):
    """Inside, what draws from the global random state, such as dropout, follows `generator`; then all is as before."""
    place = generator.device
    if place.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            yield
    else:
        with torch.random.fork_rng([place.index or 0], device_type=place.type):
            torch.get_device_module(place).set_rng_state(generator.get_state(), place)
            yield


def own_share(batch: int, processes: int) -> int:
    """How many images of a batch are this process's. Errors: ValueError if the batch cannot be divided evenly."""
    if batch % processes:
        raise ValueError(
            f"expected a batch that {processes} processes can share evenly, got {batch} images; take a "
            f"multiple of {processes}."
        )
    return batch // processes


def is_late(chip: Accelerator, progress: "Progress", end: float) -> bool:
    """Whether to pause after this step, at the time `end` of the monotonic clock; never after the last one.

    All processes agree, and with several of them that is asked now and then only.
    """
    if progress.step == progress.steps or (chip.num_processes > 1 and progress.step % 10):
        return False
    late = torch.tensor(float(time.monotonic() > end), device=chip.device)
    return bool(chip.reduce(late, "sum") > 0)


def commit() -> str | None:
    """The commit of this checkout, ending in + if a tracked file differs from it; None where there is none."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    # a card without its commit is better than no card
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [
            "git",
            "--no-optional-locks",
            "-C",
            str(root),
            "describe",
            "--always",
            "--exclude=*",
            "--abbrev=12",
            "--dirty=+",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
    return None


class Curve:
    """What is measured along a run, twenty times, kept beside its checkpoint so that a resumed run has it all."""

    def __init__(self, checkpoint: Path):
        self.path = checkpoint.with_name(f"{checkpoint.name}.curve.jsonl")
        if not checkpoint.exists():  # what is there is of a run that was given up
            self.path.unlink(missing_ok=True)
        files.mend(self.path, b'{"images": ')

    def add(self, progress: "Progress", **point) -> None:
        """Keep what was measured after this step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(images=progress.images, seconds=round(progress.seconds, 1), **point))
        files.append(self.path, line.encode() + b"\n")

    def points(self) -> list[dict]:
        """What was measured so far; what a run that was cut short repeated counts once."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return list({point["images"]: point for point in map(json.loads, lines)}.values())


@dataclass(frozen=True)
class Progress:
    """Where a training run stands: step of steps, images seen, seconds spent training in all, and the step's loss.

    steps         of a run by time: as many as are expected so far, and `step` once it is over
    is_milestone  whether this is one of the twenty steps after which a run is measured
    """

    step: int
    steps: int
    images: int
    seconds: float
    measured: Tensor
    is_milestone: bool = False

    @property
    def loss(self) -> float:
        """The loss of this step. Reading it waits for the accelerator, so read it now and then, not at every step."""
        return float(self.measured)


class Training:
    """A run: iterate over it to train, stop whenever you like, iterate again (or make it again) to go on.

    Randomness  step i of process r draws its batch, noise and levels from (seed, i, r) alone, so a resumed run equals
                an unbroken one; a run by time depends on the clock as well, which goes on where it was stopped
    Writes      `checkpoint`, a safetensors file with weights, average and optimiser state, every `save_every` steps
    Precision   "fp32", or "bf16": the network in bfloat16 under autocast, weights and arithmetic of levels in float32
    Units       minutes: of training, in place of the steps, which then only say how far back the average reaches
    Divergence  a loss with a limit may pass it: weights, average and optimiser then go back to where they were at the last
                multiple of `save_every` steps, and the run goes on with the draws of its next step; its card says when
    Memory      where it runs out, the gradient is summed over halves, of halves, of the batch: the noise is drawn for all
                of it before, so the result is the same but for rounding and for dropout, which is the network's own
    """

    def __init__(
        self,
        denoiser: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss = DENOISING,
        steps: int,
        minutes: float | None = None,
        batch: int = 256,
        rate: float = 2e-3,
        ema: float = 0.995,
        mirror: bool = False,
        seed: int = 0,
        precision: str = "fp32",
        compiled: bool = False,
        optimiser: Callable[[nn.Module, float], Optimiser] = Optimiser,
        checkpoint: str | Path | None = None,
        save_every: int = 100,
    ):
        self.accelerator = Accelerator()
        self.own = own_share(batch, self.accelerator.num_processes)
        place = self.accelerator.device
        # as measured
        fastest = (
            torch.channels_last if torch.accelerator.is_available() else torch.contiguous_format
        )
        self.denoiser = denoiser.to(place, memory_format=fastest)
        self.images = images.to(place)
        self.labels = labels.to(place)
        self.loss = loss
        self.settings = dict(
            steps=steps,
            batch=batch,
            rate=rate,
            ema=ema,
            mirror=mirror,
            seed=seed,
            count=len(images),
            minutes=minutes,
            optimiser=optimiser.__name__,
        )
        self.schedule = Schedule(rate, ema, steps, minutes)
        self.average = copy.deepcopy(denoiser).requires_grad_(False)
        self.optimiser = optimiser(denoiser, rate)
        self.step = 0
        self.seconds = 0.0
        self.precision = device.available(precision, place)
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.save_every = save_every
        self.piece = self.own
        # how much of itself the average gives up in a step: a tensor, so that a captured step can be told anew
        self.given_up = torch.zeros((), device=place)
        self.fallen: list[int] = []  # the steps after which it went back
        self.good: dict[str, Tensor] = self._state() if loss.limit is not None else {}
        if self.checkpoint and self.checkpoint.exists():
            self._resume()
        if compiled:  # in place, so that the names of the weights stay
            device.keep_compiled(files.cache() / "compiled")
            self.denoiser.network.compile()
        self.compiled = compiled
        self._graph: device.Replayed | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done."""
        return self.schedule.part(self.step, self.seconds) >= 1

    def __iter__(self) -> Iterator[Progress]:
        try:
            self._prepare()
            while not self.is_over:
                before = self._twentieths()
                started = time.perf_counter()
                measured = self._one_step()
                self._check(measured)
                self._secure(measured)
                self.step += 1
                self._spend(time.perf_counter() - started)
                due = self.is_over or self.step % self.save_every == 0
                if self.is_over:
                    self._check(measured, always=True)
                if self.checkpoint and due:
                    self.save()
                yield Progress(
                    self.step,
                    self.schedule.steps_at(self.step, self.seconds),
                    self.step * self.settings["batch"],
                    self.seconds,
                    measured,
                    self._twentieths() > before,
                )
        except (FloatingPointError, MemoryError):
            raise  # what is in memory is spoilt: the checkpoint before it stays
        except BaseException:
            self._keep()
            raise

    def _twentieths(self) -> int:
        # the slack is for shares such as 0.35, a hair too small as a float
        return int(20 * self.schedule.part(self.step, self.seconds) + 1e-9)

    def _check(self, measured: Tensor, always: bool = False) -> None:
        """Now and then, as asking waits for the accelerator, and before anything is written."""
        if self.loss.limit is not None:
            return  # `_secure` has looked at every step
        due = self.checkpoint and (self.step + 1) % self.save_every == 0
        if (always or due or self.step % 10 == 0) and not torch.isfinite(measured):
            raise FloatingPointError(
                f"the loss became {float(measured)} at step {self.step - always}; lower the rate "
                f"({self.settings['rate']:g}) and start again from the last checkpoint."
            )

    def _secure(self, measured: Tensor) -> None:
        """Of a loss with a limit: keep the state now and then, and go back to it where the limit is passed, or NaN.

        Errors      FloatingPointError for a run that has gone back too often
        """
        limit = self.loss.limit
        if limit is None:
            return
        if abs(float(measured)) <= limit:
            if (self.step + 1) % self.save_every == 0:
                self.good = self._state()
            return
        if len(self.fallen) == MOST_FALLS:
            raise FloatingPointError(
                f"the loss became {float(measured):.3g} at step {self.step}, after the run had gone back {MOST_FALLS} times; "
                f"lower the rate ({self.settings['rate']:g}) and start again."
            )
        self.fallen.append(self.step)
        self._go_to(self.good)
        warnings.warn(
            f"the loss became {float(measured):.3g} at step {self.step}, beyond {limit:g}: the run has diverged and goes on "
            f"from its last good state ({len(self.fallen)} of at most {MOST_FALLS} times).",
            stacklevel=2,
        )

    def _spend(self, seconds: float) -> None:
        """Add to the clock; where time decides, all processes share one, or their rates would differ."""
        if self.schedule.minutes is not None and self.accelerator.num_processes > 1:
            own = torch.tensor(seconds, device=self.accelerator.device)
            seconds = float(self.accelerator.reduce(own, "mean"))
        self.seconds += seconds

    def _keep(self) -> None:
        """An interrupted or abandoned run keeps what it has done."""
        if self.checkpoint and self.step and not self.is_over:
            self.save()

    def _one_step(self) -> Tensor:
        """One step: everything is drawn and told, then gradient and update, which depend on nothing else."""
        batch = self._drawn()
        self.optimiser.set_rate(self.schedule.rate_at(self.step, self.seconds))
        self.given_up.fill_(1 - self.schedule.keep_at(self.step, self.seconds))
        loss = self._within_memory(self._replayed, *batch)
        return self.accelerator.reduce(loss, "mean")

    def _generator(self, first: int = 0) -> torch.Generator:
        """The source of this step's draws: `first` tells its own from those of the network, such as dropout."""
        processes = self.accelerator.num_processes
        rank = self.accelerator.process_index
        seed = (self.settings["seed"] * 1_000_003 + self.step) * processes + rank
        return torch.Generator(self.accelerator.device).manual_seed(first + seed)

    def _drawn(self) -> tuple[Tensor, Tensor, Noise]:
        """This step's images and labels, and all the noise that its loss asks for."""
        place = self.accelerator.device
        generator = self._generator()
        chosen = torch.randint(len(self.images), (self.own,), generator=generator, device=place)
        images = self.images[chosen]
        if self.settings["mirror"]:
            turned = torch.rand(self.own, generator=generator, device=place) < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(3), images)
        labels = self.labels[chosen]
        self.denoiser.train()
        with torch.no_grad():
            return images, labels, self.loss.draw(self.denoiser, images, labels, generator)

    def _within_memory(
        self, act: Callable[..., Tensor], images: Tensor, labels: Tensor, noise: Noise
    ) -> Tensor:
        """What `act` gives for this batch; where memory runs out, again with half as many images at once.

        Errors      torch.OutOfMemoryError where one image is too many
        """
        while True:
            try:
                with global_draws_from(self._generator(2**40)):
                    return act(images, labels, noise)
            except torch.OutOfMemoryError:
                if self.piece == 1:
                    raise
            # after the exception, whose frames hold what has to go
            self.piece = (self.piece + 1) // 2
            self._graph = None
            self.denoiser.zero_grad(set_to_none=True)
            device.give_back_memory(self.accelerator.device)
            warnings.warn(
                f"memory ran out; going on with {self.piece} images at once, {self.own} a step as before: "
                "same result, slower.",
                stacklevel=2,
            )

    def _prepare(self) -> None:
        """Compile, before a clock runs: a gradient that changes no weight."""
        if self.compiled and self.schedule.minutes is not None and not self.is_over:
            self._within_memory(self.gradients, *self._drawn())
            self.denoiser.zero_grad(set_to_none=True)

    def captures(self) -> bool:
        """Whether steps are captured and replayed: where the device does that, for a single process and a silent loss."""
        alone = self.accelerator.num_processes == 1
        return device.replays(self.accelerator.device) and alone and self.loss.silent

    def _replayed(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """`work` of these tensors, replayed where it is captured; an optimiser that cannot be follows it."""
        whole = self.optimiser.captured
        work = self.work if whole else self.gradients
        if not self.captures():
            loss = work(images, labels, noise)
        else:
            if self._graph is None:

                def flat(images: Tensor, labels: Tensor, *drawn: Tensor) -> Tensor:
                    rest = iter(drawn)
                    return work(images, labels, each(lambda part: next(rest), noise))

                self._graph = device.Replayed(flat)
            loss = self._graph(images, labels, *parts(noise))
        if not whole:
            self.update()
        return loss

    def work(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """Gradient and update: the one function of a step, called plainly or captured. Shapes: -> scalar, the loss."""
        loss = self.gradients(images, labels, noise)
        self.update()
        return loss

    def gradients(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """The gradient of the mean loss in every weight, summed over slices of the batch. Shapes: -> scalar, the loss."""
        self.denoiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=images.device)
        for start in range(0, len(images), self.piece):
            kept = slice(start, start + self.piece)
            share = len(images[kept]) / len(images)
            with device.in_precision(self.precision, images, cached=False):
                loss = self.loss.value(self.denoiser, images[kept], labels[kept], take(noise, kept))
            (share * loss).backward()
            total = total + share * loss.detach()
        return total

    def update(self) -> None:
        """One step of the optimiser along the clipped gradient, and of the average towards the weights.

        Errors      MemoryError where memory runs out here: a part may be done already, so it cannot be done again
        """
        try:
            self._share_gradients()
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
            self.optimiser.step()
            with torch.no_grad():
                average = list(self.average.parameters())
                apart = torch._foreach_sub(list(self.denoiser.parameters()), average)
                torch._foreach_mul_(apart, self.given_up)
                torch._foreach_add_(average, apart)
                for mine, own in zip(self.average.buffers(), self.denoiser.buffers(), strict=True):
                    mine.copy_(own)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"memory ran out while the weights were changed, which fewer images at once do not help: {error}"
            ) from error

    def _share_gradients(self) -> None:
        """Average the gradients over the processes, as one message."""
        if self.accelerator.num_processes > 1:
            weights = [p for p in self.denoiser.parameters() if p.grad is not None]
            whole = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in weights]), "mean")
            for p, part in zip(weights, whole.split([p.numel() for p in weights]), strict=True):
                p.grad.copy_(part.view_as(p))

    def facts(self) -> dict:
        """What every model card says of a run: how much, how long, on what, with what, when."""
        fallen = {} if self.loss.limit is None else dict(diverged_at_steps=self.fallen)
        return fallen | dict(
            images_seen=self.step * self.settings["batch"],
            seconds=round(self.seconds, 1),
            device=self.accelerator.device.type,
            processes=self.accelerator.num_processes,
            threads=torch.get_num_threads(),
            torch=torch.__version__.split("+")[0],
            commit=commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )

    def save(self) -> None:
        """Write the checkpoint (one process does); the previous one survives an interruption."""
        if not self.accelerator.is_main_process:
            return
        tensors = self._state() | {f"good.{n}": v for n, v in self.good.items()}
        header = json.dumps(
            dict(settings=self.settings, step=self.step, seconds=self.seconds, fallen=self.fallen)
        )
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(self.checkpoint, tensors, {"run": header})

    def _state(self) -> dict[str, Tensor]:
        """A copy of weights, average and optimiser state, by name."""
        tensors = {f"now.{n}": v for n, v in self.denoiser.state_dict().items()}
        tensors |= {f"average.{n}": v for n, v in self.average.state_dict().items()}
        tensors |= {f"optimiser.{n}": v for n, v in self.optimiser.state().items()}
        return {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}

    def _go_to(self, tensors: dict[str, Tensor]) -> None:
        """Take weights, average and optimiser state from what `_state` gave."""
        own = self.denoiser.state_dict()
        self.denoiser.load_state_dict({n: tensors[f"now.{n}"] for n in own})
        self.average.load_state_dict({n: tensors[f"average.{n}"] for n in own})
        prefix = "optimiser."
        kept = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        self.optimiser.load(kept)

    def _resume(self) -> None:
        try:
            with safetensors.safe_open(self.checkpoint, framework="pt") as file:
                run = json.loads((file.metadata() or {}).get("run", "null"))
            tensors = load_file(self.checkpoint)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"expected a training checkpoint in {self.checkpoint.name}, got a damaged file ({error}); "
                "delete it to start afresh."
            ) from None
        differing = {
            k for k in self.settings if run is None or run["settings"].get(k) != self.settings[k]
        }
        if differing:
            raise ValueError(
                f"expected to resume {self.checkpoint.name} with the settings it was started with, but "
                f"{sorted(differing)} differ; delete it to start afresh, or use the old settings."
            )
        own = self.denoiser.state_dict()
        if {n[4:] for n in tensors if n.startswith("now.")} != set(own) or any(
            tensors[f"now.{n}"].shape != v.shape for n, v in own.items()
        ):
            raise ValueError(
                f"the checkpoint {self.checkpoint.name} holds another architecture; "
                "delete it to start afresh."
            )
        check_finite(tensors, self.checkpoint.name)
        self._go_to(tensors)
        good = {n: v for n, v in tensors.items() if n.startswith("good.")}
        self.good = {n.removeprefix("good."): v for n, v in good.items()}
        self.fallen = run.get("fallen", [])
        self.step = run["step"]
        self.seconds = run["seconds"]
