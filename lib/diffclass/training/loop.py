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
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import safetensors
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from diffclass.denoisers.base import Denoiser
from diffclass.device import in_precision
from diffclass.storage import files
from diffclass.storage.weights import check_finite
from diffclass.training.losses import Loss, denoising_loss

DENOISING = denoising_loss()


@contextlib.contextmanager
def global_draws_from(generator: torch.Generator):
    """Inside, what draws from the global random state, such as dropout, follows `generator`; then all is as before."""
    device = generator.device
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            yield
    else:
        with torch.random.fork_rng([device.index or 0], device_type=device.type):
            torch.get_device_module(device).set_rng_state(generator.get_state(), device)
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
    """Where a training run stands: step of steps, images seen, seconds spent training in all, and the step's loss."""

    step: int
    steps: int
    images: int
    seconds: float
    measured: Tensor

    @property
    def loss(self) -> float:
        """The loss of this step. Reading it waits for the accelerator, so read it now and then, not at every step."""
        return float(self.measured)

    @property
    def is_milestone(self) -> bool:
        """Whether this is one of the twenty steps after which a run is measured."""
        return self.step % max(1, self.steps // 20) == 0


class Training:
    """A run: iterate over it to train, stop whenever you like, iterate again (or make it again) to go on.

    Randomness  step i of process r draws its batch, noise and levels from (seed, i, r) alone, so a resumed run equals
                an unbroken one
    Writes      `checkpoint`, a safetensors file with weights, average and optimiser state, every `save_every` steps
    Precision   "fp32", or "bf16": the network in bfloat16 under autocast, weights and arithmetic of levels in float32
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss = DENOISING,
        steps: int,
        batch: int = 256,
        rate: float = 2e-3,
        ema: float = 0.995,
        mirror: bool = False,
        seed: int = 0,
        precision: str = "fp32",
        compiled: bool = False,
        checkpoint: str | Path | None = None,
        save_every: int = 100,
    ):
        self.accelerator = Accelerator()
        self.own = own_share(batch, self.accelerator.num_processes)
        device = self.accelerator.device
        # as measured
        fastest = (
            torch.channels_last if torch.accelerator.is_available() else torch.contiguous_format
        )
        self.denoiser = denoiser.to(device, memory_format=fastest)
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.loss = loss
        self.settings = dict(
            steps=steps,
            batch=batch,
            rate=rate,
            ema=ema,
            mirror=mirror,
            seed=seed,
            count=len(images),
        )
        self.average = copy.deepcopy(denoiser).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            denoiser.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.step = 0
        self.seconds = 0.0
        self.precision = precision
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.save_every = save_every
        if self.checkpoint and self.checkpoint.exists():
            self._resume()
        if compiled:  # in place, so that the names of the weights stay
            self.denoiser.network.compile()

    def __iter__(self) -> Iterator[Progress]:
        steps = self.settings["steps"]
        try:
            while self.step < steps:
                started = time.perf_counter()
                measured = self._one_step(steps)
                due = (
                    self.step + 1 == steps
                    or self.checkpoint
                    and (self.step + 1) % self.save_every == 0
                )
                # asking waits for the accelerator
                if (due or self.step % 10 == 0) and not torch.isfinite(measured):
                    raise FloatingPointError(
                        f"the loss became {float(measured)} at step {self.step}; lower the rate "
                        f"({self.settings['rate']:g}) and start again from the last checkpoint."
                    )
                self.step += 1
                self.seconds += time.perf_counter() - started
                if self.checkpoint and due:
                    self.save()
                yield Progress(
                    self.step, steps, self.step * self.settings["batch"], self.seconds, measured
                )
        except FloatingPointError:  # what is in memory is spoilt: the checkpoint before it stays
            raise
        except BaseException:
            self._keep()
            raise

    def _keep(self) -> None:
        """An interrupted or abandoned run keeps what it has done."""
        if self.checkpoint and 0 < self.step < self.settings["steps"]:
            self.save()

    def _one_step(self, steps: int) -> Tensor:
        settings = self.settings
        device = self.accelerator.device
        rank = self.accelerator.process_index
        seed = (settings["seed"] * 1_000_003 + self.step) * self.accelerator.num_processes + rank
        generator = torch.Generator(device).manual_seed(seed)
        chosen = torch.randint(len(self.images), (self.own,), generator=generator, device=device)
        images = self.images[chosen]
        if settings["mirror"]:
            turned = torch.rand(self.own, generator=generator, device=device) < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(3), images)
        warm = min(1.0, (self.step + 1) / 20)
        for group in self.optimiser.param_groups:  # warm up, then fall linearly to a hundredth
            group["lr"] = settings["rate"] * warm * max(0.01, 1 - self.step / steps)
        self.denoiser.train()
        with (
            in_precision(self.precision, self.images),
            global_draws_from(torch.Generator(device).manual_seed(2**40 + seed)),
        ):
            loss = self.loss(self.denoiser, images, self.labels[chosen], generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimiser.step()
        keep = min(settings["ema"], (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.denoiser.parameters()), 1 - keep
            )
        return self.accelerator.reduce(loss.detach(), "mean")

    def _share_gradients(self) -> None:
        """Average the gradients over the processes, as one message."""
        if self.accelerator.num_processes > 1:
            weights = [p for p in self.denoiser.parameters() if p.grad is not None]
            whole = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in weights]), "mean")
            for p, part in zip(weights, whole.split([p.numel() for p in weights]), strict=True):
                p.grad.copy_(part.view_as(p))

    def facts(self) -> dict:
        """What every model card says of a run: how much, how long, on what, with what, when."""
        return dict(
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
        tensors = {f"now.{n}": v for n, v in self.denoiser.state_dict().items()}
        tensors |= {f"average.{n}": v for n, v in self.average.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{n}": torch.as_tensor(v) for n, v in state.items()}
        header = json.dumps(dict(settings=self.settings, step=self.step, seconds=self.seconds))
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(
            self.checkpoint,
            {n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()},
            {"run": header},
        )

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
        self.denoiser.load_state_dict({n: tensors[f"now.{n}"] for n in own})
        self.average.load_state_dict({n: tensors[f"average.{n}"] for n in own})
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step = run["step"]
        self.seconds = run["seconds"]
