"""Frames of the smallest smoothed classifier: a picture of one pixel, a jagged base, and what noise makes of it, exactly."""

import functools
import math

import numpy as np
import torch
from scipy import special

from diffclass import units
from diffclass.certify import lipschitz
from diffclass.course import figures
from diffclass.course.figures import BEST, COLOURS, SECOND
from diffclass.noise import generator_of

REACH = 1.0  # the picture's pixel lies in [-1, 1], as the stripes do
GRID = np.linspace(-REACH, REACH, 401)
TALLEST = 4.0  # sigmas at which the scale of the second panel ends
SURE = 1 - 1e-12  # a larger share is taken for this one, so that rounding makes no radius too large
CLASSES = ("A", "B")


def barcode(narrow: float, wide: float, generator: torch.Generator) -> np.ndarray:
    """Stripes of random widths that fill the line between -1 and 1. Shapes: -> edges [2N]: class A from even to odd ones."""
    widths = torch.rand(2 * math.ceil(REACH / narrow) + 2, generator=generator, dtype=torch.float64)
    edges = np.cumsum(narrow + (wide - narrow) * widths.numpy()) - REACH - narrow
    edges = edges[edges < REACH]
    return edges[: len(edges) // 2 * 2]


class SmoothingScene:
    """A base classifier that says A on stripes of the line and B elsewhere, and the majority of its noised copies.

    Formula     g(x) = sum_i Phi((b_i - x) / sigma) - Phi((a_i - x) / sigma),  stripes [a_i, b_i]: no copy is drawn
    Units       sigma and distances in those of the one pixel
    """

    def __init__(self, seed: int = 0):
        self.bases = {
            "a barcode": barcode(0.02, 0.5, generator_of(seed, "barcode")),
            "a finer barcode": barcode(0.005, 0.07, generator_of(seed, "finer barcode")),
            "a straight boundary": np.array([0.0, math.inf]),
        }
        self._turns = functools.lru_cache(maxsize=64)(self._find_turns)

    def share(self, base: str, x, sigma: float) -> np.ndarray:
        """The share of noised copies that the base takes for class A, exactly. Shapes: x [N] -> [N]."""
        edges = self.bases[units.chosen(base, tuple(self.bases), "the base classifier")]
        reach = (edges[:, None] - np.atleast_1d(x)) / sigma
        below = special.ndtr(reach)
        return (below[1::2] - below[::2]).sum(0)

    def turns(self, base: str, sigma: float) -> np.ndarray:
        """Where the majority changes. Shapes: -> places [N] of the line, rising."""
        return self._turns(base, round(float(sigma), 6))

    def _find_turns(self, base: str, sigma: float) -> np.ndarray:
        at = np.linspace(-3 * REACH, 3 * REACH, 12_001)
        lead = self.share(base, at, sigma) - 0.5
        left = np.flatnonzero(np.sign(lead[:-1]) != np.sign(lead[1:]))
        step = (at[1] - at[0]) * lead[left] / (lead[left] - lead[left + 1])
        return at[left] + step

    def nearest_turn(self, base: str, x: float, sigma: float) -> float | None:
        """How far the nearest picture is that the majority answers differently; None where there is none in reach."""
        turns = self.turns(base, sigma)
        return float(np.abs(turns - x).min()) if len(turns) else None

    def radii(self, base: str, x: float, sigma: float) -> tuple[float, float]:
        """What the share alone proves, by the strong law and by the weak one.

        Formula     sigma Phi^-1(p) and (2 p - 1) / (2 L),  L = 1 / (sigma sqrt(2 pi)),  p the share of the majority
        """
        of_a = float(self.share(base, x, sigma)[0])
        p = min(max(of_a, 1 - of_a), SURE)
        strong = sigma * float(special.ndtri(p))
        weak = lipschitz.weak_radius(p, 1 - p, 1 / (sigma * math.sqrt(2 * math.pi)))
        return strong, weak

    def at(self, base: str, x: float, sigma: float) -> dict:
        """The frame: shares along the line, the same on the scale where no classifier is steep, and the radii."""
        here = float(self.share(base, x, sigma)[0])
        answer = CLASSES[here < 0.5]
        strong, weak = self.radii(base, x, sigma)
        truth = self.nearest_turn(base, x, sigma)
        return figures.frame(
            [
                [self._shares(base, x, sigma), self._scaled(base, x, sigma, strong)],
                [self._axis(strong, weak, truth)],
            ],
            self._said(base, x, sigma, max(here, 1 - here), answer, strong, weak, truth),
        )

    def _shares(self, base: str, x: float, sigma: float) -> dict:
        edges = np.clip(self.bases[base], -REACH, REACH)
        corners = np.concatenate([[-REACH], np.repeat(edges, 2), [REACH]])
        heights = np.concatenate([[0.0], np.tile([0.0, 1.0, 1.0, 0.0], len(edges) // 2), [0.0]])
        series = [
            dict(
                x=corners,
                y=heights,
                colour=SECOND,
                width=0.8,
                opacity=0.6,
                fill=True,
                label="the base: A on stripes",
            ),
            dict(
                y=self.share(base, GRID, sigma),
                colour=BEST,
                width=2.4,
                label="share of copies that are A",
            ),
            dict(y=np.full(len(GRID), 0.5), colour=figures.OTHER, dash="3 3"),
        ]
        return figures.curves(
            GRID,
            series,
            title="What the base says, and what its noised copies say",
            xlabel="the picture: a single pixel x (drag)",
            ylabel="share of class A",
            yrange=(0.0, 1.25),
            cursor=x,
            w=460,
            h=270,
            alt=f"The base classifier jumps {len(edges)} times between 0 and 1; the share of its noised copies is smooth, "
            f"and {float(self.share(base, x, sigma)[0]):.3f} at the picture.",
        )

    def _scaled(self, base: str, x: float, sigma: float, strong: float) -> dict:
        scale = np.clip(special.ndtri(self.share(base, GRID, sigma)), -TALLEST, TALLEST)
        height = float(np.clip(special.ndtri(self.share(base, x, sigma)[0]), -TALLEST, TALLEST))
        foot = min(strong, TALLEST * sigma)
        series = [
            dict(y=scale, colour=BEST, width=2.4, label="Φ⁻¹ of the share"),
            dict(
                x=np.array([x - foot, x, x + foot]),
                y=np.array([0.0, height, 0.0]),
                colour=COLOURS[2],
                width=1.8,
                label="as steep as allowed: 1/σ",
            ),
            dict(y=np.zeros(len(GRID)), colour=figures.OTHER, dash="3 3"),
        ]
        return figures.curves(
            GRID,
            series,
            title="The same, through Φ⁻¹: nowhere steeper than 1/σ",
            xlabel="the picture: a single pixel x (drag)",
            ylabel="Φ⁻¹(share), in σ",
            yrange=(-TALLEST, TALLEST * 1.35),
            cursor=x,
            w=460,
            h=270,
            alt=f"The inverse normal of the share, with the two steepest lines allowed from {height:.2f} at the picture down "
            f"to zero, which they reach {foot:.2f} away.",
        )

    def _axis(self, strong: float, weak: float, truth: float | None) -> dict:
        ends = [strong, weak, *([] if truth is None else [truth])]
        rows = [
            dict(label="by the strong law", certified=strong, attacked=truth),
            dict(label="by the weak law", certified=weak, attacked=truth),
        ]
        return figures.radius_axis(
            rows,
            title="How far is the nearest picture with another answer?",
            xlabel="change of the pixel; known here from both sides",
            range=(0.0, max(0.5, 1.15 * max(ends))),
            w=920,
            alt=f"Certified {strong:.2f} by the strong law and {weak:.2f} by the weak one; the nearest other answer is "
            + ("out of reach." if truth is None else f"{truth:.2f} away."),
        )

    def _said(
        self,
        base: str,
        x: float,
        sigma: float,
        p: float,
        answer: str,
        strong: float,
        weak: float,
        truth: float | None,
    ) -> str:
        away = "out of reach" if truth is None else f"<b>{truth:.3f}</b> away"
        return (
            f"At x = {x:.2f}, {p:.4f} of the copies of {base} with noise σ = {sigma:.2f} are taken for class {answer}. That "
            f"share alone proves a radius of σ Φ⁻¹({p:.4f}) = <b>{strong:.3f}</b> by the strong law and {weak:.3f} by the weak "
            f"one; the nearest other answer is {away}."
        )
