"""Frames of the plane: a point is dragged, and losses, posterior, bound and denoised points follow."""

import numpy as np
import torch
from torch import Tensor

from diffclass import likelihood, noise, units
from diffclass.classifiers.base import decided
from diffclass.course import figures
from diffclass.course.figures import COLOURS
from diffclass.data.plane import MixtureLaw
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank, Weighting

FIRST = 0.02  # ends of notebook 02's chain, model units
LAST = 50.0
RESOLUTION = 96  # pixels along each side of a backdrop


def letters(count: int) -> list[str]:
    """Names of the plane's classes: A, B, C, ..."""
    return [chr(ord("A") + k) for k in range(count)]


def grid_points(limit: float, resolution: int = RESOLUTION) -> Tensor:
    """The centres of a backdrop's pixels, row by row from the top left. Shapes: -> [R*R,2,1,1] of model space."""
    side = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution * 2 * limit - limit
    y, x = torch.meshgrid(side.flip(0), side, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2, 1, 1)


def point_of(xy) -> Tensor:
    """A dragged point as an image of model space. Shapes: (x, y) -> [1,2,1,1], float64."""
    return torch.tensor([float(v) for v in xy], dtype=torch.float64).reshape(1, 2, 1, 1)


class PlaneScene:
    """One law of the plane with its exact denoiser, and the frames of notebooks 02 to 04.

    Randomness  one fixed bank of noise, so that a frame depends on the controls alone
    """

    WEIGHTINGS = noise.WEIGHTINGS

    def __init__(self, law: MixtureLaw, levels: int = 40, samples: int = 64, seed: int = 0):
        self.law = law
        self.denoiser = MixtureDenoiser.of_law(law)
        self.names = letters(law.num_classes)
        self.colours = list(COLOURS[: law.num_classes])
        self.bank = NoiseBank.sobol(
            noise.log_levels(0.02, 20, levels), (2, 1, 1), samples, seed, torch.float64
        )
        generator = torch.Generator().manual_seed(seed)
        x, y = law.sample(150, generator, torch.float64)
        self.dots = units.to_model(x).flatten(1).numpy()
        self.dot_colours = [COLOURS[int(k)] for k in y]
        self.log_prior = law.priors.log()
        self.first_eps = torch.randn(256, 2, 1, 1, generator=generator, dtype=torch.float64)
        self._chains: dict[int, NoiseBank] = {}

    def backdrop(self, sigma: float = 0.0, limit: float = 1.0) -> dict:
        """The exact posterior of every pixel at one noise level, as a picture for the plane panel."""
        density = self.denoiser.log_density(grid_points(limit), sigma)
        return figures.mixture_backdrop(torch.softmax(density + self.log_prior, 1), RESOLUTION)

    def curves(self, y, title: str, ylabel: str, alt: str, **more) -> dict:
        """One curve for each class over the bank's noise levels. Shapes: y [K,T] -> a panel."""
        series = [
            dict(y=row, colour=c, label=n, width=2.2)
            for row, c, n in zip(y, self.colours, self.names, strict=True)
        ]
        return figures.curves(
            self.bank.sigma,
            series,
            title=title,
            xlabel="noise level σ (model units)",
            ylabel=ylabel,
            alt=alt,
            xlog=True,
            **{"h": 280, **more},
        )

    def posterior_bars(self, share: Tensor, exact: Tensor, title: str) -> dict:
        """Posterior of each class as bars, the exact one as marks. Shapes: [K], [K] -> a panel."""
        return figures.bars(
            self.names,
            share,
            title=title,
            colours=self.colours,
            marks=exact,
            texts=[f"{float(p):.2f}" for p in share],
            xlabel="class (line: exact)",
            h=280,
            w=280,
            alt=f"Posterior bars; the exact posterior is {_spoken(self.names, exact)}.",
        )

    def plane(self, xy, title: str, **more) -> dict:
        """The plane with the sampled points and the handle; the colours are those of `backdrop`, whatever the controls."""
        where = f"{float(xy[0]):.2f}, {float(xy[1]):.2f}"
        return figures.plane(
            title=title,
            handle=xy,
            backdrop="posterior",
            dots=self.dots,
            dot_colours=self.dot_colours,
            alt=f"Plane of the {self.law.name} law, coloured by its exact posterior without noise, under its own "
            f"prior; the point is at {where}.",
            **more,
        )

    # -- notebook 03 --------------------------------------------------------------------------------------------------

    def bayes(self, xy, prior_of_a: float, temperature: float, weighting: Weighting) -> dict:
        """Losses, evidence and posterior of one point under a prior, a temperature and a weighting."""
        z = point_of(xy)
        losses = likelihood.diffusion_loss(self.denoiser, z, self.bank)[0]  # [K,T]
        others = len(self.names) - 1
        prior = [prior_of_a] + [(1 - prior_of_a) / others] * others
        log_prior = torch.tensor(prior, dtype=torch.float64).log()
        levels = self.bank.levels
        evidence = likelihood.evidence(losses, levels, weighting)
        share = torch.softmax(evidence / temperature + log_prior, 0)
        exact = torch.softmax(self.denoiser.log_density(z, 0.0)[0] + log_prior, 0)
        density = losses * weighting(levels) / levels.step * levels.sigma  # per unit of ln sigma
        best = int(decided(evidence[None]))
        note = (
            f"Posterior {_spoken(self.names, share)}; exact {_spoken(self.names, exact)}. "
            f"Total variation {float((share - exact).abs().sum() / 2):.3f}. The plane is coloured by the exact "
            f"posterior under the law's own prior, {_spoken(self.names, self.log_prior.exp())}."
        )
        return figures.frame(
            [
                [
                    self.plane(xy, "Drag the point"),
                    self.curves(
                        density - density[best],
                        f"Evidence against each class (best: {self.names[best]})",
                        "nats per unit of ln σ",
                        "Excess weighted loss of each class over the best, against sigma.",
                    ),
                    self.posterior_bars(share, exact, "Posterior"),
                ]
            ],
            note,
        )

    # -- notebook 02 --------------------------------------------------------------------------------------------------

    def elbo(self, xy, steps: int) -> dict:
        """KL terms of a chain of `steps` steps, the bound of each class, and the gap as the chain grows."""
        z = point_of(xy)
        # E log p at the chain's beginning
        exact = self.denoiser.log_density(z + FIRST * self.first_eps, FIRST).mean(0)
        counts = [4, 8, 16, 32, 64, 128]
        bounds = {count: self._bound(z, count)[1] for count in counts}
        kl, bound, sigma = self._bound(z, steps)
        best = int(decided(exact[None]))
        gaps = [max(float(exact[best] - bounds[count][best]), 1e-3) for count in counts]
        here = float(exact[best] - bound[best])
        low = min(float(bound.min()), float(exact.min())) - 1
        kl_panel = figures.curves(
            sigma,
            [
                dict(y=row, colour=c, label=n, width=2)
                for row, c, n in zip(kl, self.colours, self.names, strict=True)
            ],
            title=f"KL per step, {steps} steps",
            ylabel="nats",
            xlabel="noise level σ of the step",
            xlog=True,
            xrange=(FIRST, LAST),
            yrange=(0, max(1.0, float(kl.max()) * 1.05)),
            alt="KL term of every step of the chain, one curve for each class.",
            w=300,
            h=280,
        )
        gap_line = dict(
            y=gaps, colour=self.colours[best], label=f"class {self.names[best]}", width=2
        )
        gap_panel = figures.curves(
            counts,
            [gap_line],
            title="Gap against the number of steps",
            xlabel="steps T (drag)",
            ylabel="nats",
            xlog=True,
            ylog=True,
            yrange=(1e-2, 100),
            cursor=steps,
            w=270,
            h=280,
            alt="The gap between exact log-likelihood and bound falls like one over T.",
        )
        bars = figures.bars(
            self.names,
            bound,
            title="ELBO (line: exact)",
            colours=self.colours,
            marks=exact,
            range=(low, max(0.0, float(exact.max()) + 1)),
            texts=[f"{float(v):.2f}" for v in bound],
            xlabel="nats",
            w=190,
            h=280,
            alt=f"ELBO {_spoken(self.names, bound)}; exact {_spoken(self.names, exact)}.",
        )
        note = (
            f"With {steps} steps the bound on the model's log p_k(x), k = {self.names[best]}, is "
            f"{float(bound[best]):.3f} nats, the exact E log p_k at σ = {FIRST:g} is {float(exact[best]):.3f}: a gap of {here:.3f}."
        )
        panels = [self.plane(xy, "Drag the point"), kl_panel, bars, gap_panel]
        return figures.frame([panels], note)

    def _bound(self, z: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """KL terms [K,T], the bound in absolute nats [K], and the levels [T] of a geometric chain."""
        if steps not in self._chains:
            levels = noise.chain_levels(
                torch.logspace(np.log10(FIRST), np.log10(LAST), steps + 1, dtype=torch.float64)
            )
            samples = max(8, min(64, 1024 // steps))
            self._chains[steps] = NoiseBank.sobol(levels, (2, 1, 1), samples, 0, torch.float64)
        bank = self._chains[steps]
        losses = likelihood.diffusion_loss(self.denoiser, z, bank)[0]
        kl = losses * noise.discrete_elbo_weight(bank.levels)
        evidence = likelihood.evidence(losses, bank.levels, noise.discrete_elbo_weight)
        return kl, likelihood.noise_constant(bank.levels, 2) + evidence, bank.sigma

    # -- notebook 04 --------------------------------------------------------------------------------------------------

    def denoised(self, xy, sigma: float) -> dict:
        """E[x0 | x_sigma, k] of a noisy point for every class, and what the point says about the class."""
        x_sigma = point_of(xy)
        no_class = len(self.names)
        means = self.denoiser(x_sigma, sigma, [*range(no_class), no_class])[0].flatten(1)  # [K+1,2]
        share = torch.softmax(self.denoiser.log_density(x_sigma, sigma)[0] + self.log_prior, 0)
        mixed = (share[:, None] * means[:-1]).sum(0)
        losses = likelihood.diffusion_loss(self.denoiser, x_sigma, self.bank)[0]
        noise_errors = losses / self.bank.sigma**2
        markers = [
            (*mean.tolist(), c, n)
            for mean, c, n in zip(means, self.colours, self.names, strict=False)
        ]
        markers.append((*means[-1].tolist(), "#000000", "", 4))
        lines = [
            (*x_sigma.flatten().tolist(), *mean.tolist(), c)
            for mean, c in zip(means, self.colours, strict=False)
        ]
        note = (
            f"The unconditional denoiser (black) is the posterior-weighted mean of the others: "
            f"|D(x) − Σ p(k|x) D_k(x)| = {float((means[-1] - mixed).norm()):.1e}. The plane is coloured by the "
            "posterior without noise, at σ = 0."
        )
        return figures.frame(
            [
                [
                    self.plane(
                        xy,
                        f"Denoised at σ = {sigma:.2f}",
                        markers=markers,
                        lines=lines,
                        ring=(*xy, sigma),
                    ),
                    self.curves(
                        noise_errors,
                        "Noise error of each class, were the point clean",
                        "loss / σ²",
                        cursor=sigma,
                        w=430,
                        alt="Loss of the point under each class against sigma.",
                        yrange=(0, float(noise_errors.max()) * 1.05),
                    ),
                    figures.bars(
                        self.names,
                        share,
                        title=f"p(class | x_σ) at σ = {sigma:.2f}",
                        colours=self.colours,
                        h=280,
                        w=250,
                        texts=[f"{float(p):.2f}" for p in share],
                        xlabel="class",
                        alt=f"Posterior {_spoken(self.names, share)}.",
                    ),
                ]
            ],
            note,
        )


def _spoken(names, values) -> str:
    return ", ".join(
        f"{name} {float(value):.2f}" for name, value in zip(names, values, strict=True)
    )


class ForwardScene:
    """Notebook 01: points of the plane and a digit at time t of a schedule, in VP and VE form."""

    SCHEDULES = {
        "linear (DDPM)": noise.linear_betas,
        "cosine": noise.cosine_betas,
        "scaled linear (Stable Diffusion)": noise.scaled_linear_betas,
    }

    def __init__(self, law: MixtureLaw, digit: Tensor, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        x, y = law.sample(220, generator, torch.float64)
        self.points = units.to_model(x).flatten(1)
        self.colours = [COLOURS[int(k)] for k in y]
        self.eps = torch.randn(self.points.shape, generator=generator, dtype=torch.float64)
        self.digit = units.to_model(digit).double()
        self.pixel_eps = torch.randn(self.digit.shape, generator=generator, dtype=torch.float64)
        self.abar = {name: noise.alpha_bar(betas()) for name, betas in self.SCHEDULES.items()}

    def at(self, t: int, schedule: str) -> dict:
        """The frame at timestep t in 1..1000 of a schedule."""
        abar = self.abar[schedule][t - 1]
        signal = abar.sqrt()
        spread = (1 - abar).sqrt()
        sigma = noise.sigma_of_alpha_bar(abar)
        z_t = signal * self.points + spread * self.eps
        steps = np.arange(1, 1001, 9)
        series = [
            dict(
                y=noise.snr(noise.sigma_of_alpha_bar(a[steps - 1])),
                colour=c,
                label=name,
                width=3 if name == schedule else 1.2,
            )
            for (name, a), c in zip(self.abar.items(), COLOURS, strict=False)
        ]
        vp = signal * self.digit + spread * self.pixel_eps
        ve = self.digit + sigma * self.pixel_eps
        reach = float(1 + 2 * sigma)
        note = (
            f"t = {t}: signal √ᾱ = {float(signal):.3f}, noise √(1−ᾱ) = {float(spread):.3f}; the same picture at "
            f"σ = {float(sigma):.3f} in VE form, {float(units.sigma_to_pixel(sigma)):.3f} in pixels; "
            f"SNR = {float(abar / (1 - abar)):.3g}."
        )
        return figures.frame(
            [
                [
                    figures.plane(
                        title=f"The plane at t = {t} (VP)",
                        dots=z_t.numpy(),
                        dot_colours=self.colours,
                        limit=3.0,
                        alt=f"Points of the classes, shrunk by {float(signal):.2f}, blurred by {float(spread):.2f}.",
                    ),
                    figures.curves(
                        steps,
                        series,
                        title="Signal-to-noise ratio",
                        xlabel="timestep t (drag)",
                        ylabel="SNR",
                        ylog=True,
                        yrange=(1e-5, 1e4),
                        cursor=t,
                        w=470,
                        h=280,
                        alt="SNR of three schedules against the timestep.",
                    ),
                    figures.tiles(
                        [self.digit, vp, units.to_model((ve / reach + 1) / 2)],
                        columns=2,
                        size=106,
                        low=-1,
                        high=1,
                        title="A digit",
                        captions=["clean", "VP", "VE, rescaled"],
                        alt="A digit, its VP noised form and its VE noised form, rescaled to be visible.",
                    ),
                ]
            ],
            note,
        )
