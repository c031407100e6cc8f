"""Pure functions from arrays to the description of a figure: what the stage draws, and a test can read.

A panel is a plain dictionary; `frame` puts panels and a sentence together. No state, no model, no widget.
"""

import base64
from collections.abc import Sequence

import numpy as np

# Okabe & Ito's palette, told apart with every common colour vision; the plane's classes take the first ones.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#7F7F7F")
BEST = "#0072B2"
SECOND = "#E69F00"
OTHER = "#B0B0B0"
WRONG = "#D55E00"
UNKNOWN = "#D9D9D9"
INK = "currentColor"  # of the page's text: dark on light, light on dark


def _finite(values) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(
            f"expected finite numbers to draw, got {int((~np.isfinite(array)).sum())} that are not; NaN or infinity in "
            "the weights, the logits or the losses is the likely cause."
        )
    return array


def _list(values, digits: int = 5) -> list:
    return [float(f"{v:.{digits}g}") for v in _finite(values).ravel()]


def _range(values, given, log: bool = False) -> list[float]:
    if given is not None:
        return [float(v) for v in _finite(given)]
    array = _finite(values)
    low = float(array.min())
    high = float(array.max())
    if log:
        return [low, high if high > low else low * 10]
    pad = 0.05 * (high - low) or 0.5
    return [low - pad, high + pad]


def picture(image, low: float = 0.0, high: float = 1.0) -> dict:
    """One small image for the browser. Shapes: [H,W], [C,H,W] with C = 1 or 3, or [H,W,4] bytes -> a dictionary.

    Errors      ValueError for numbers that are not finite, which would be drawn as black
    """
    array = np.asarray(image)
    if array.dtype != np.uint8:
        share = np.clip((_finite(array) - low) / (high - low), 0, 1)
        array = (share * 255 + 0.5).astype(np.uint8)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[0] in (1, 3) and array.shape[-1] not in (3, 4):
        array = array.transpose(1, 2, 0)
    return dict(
        shape=list(array.shape),
        data=base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    )


def emphasis(scores, count: int = 2) -> list[str]:
    """Colours for K classes: the best blue, the second orange, the others grey. Shapes: scores [K] -> [K]."""
    order = np.argsort(-np.asarray(scores, dtype=float))
    colours = [OTHER] * len(order)
    for colour, k in zip((BEST, SECOND)[:count], order, strict=False):
        colours[k] = colour
    return colours


def curves(
    x,
    series: Sequence[dict],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str,
    xlog: bool = False,
    ylog: bool = False,
    xrange=None,
    yrange=None,
    cursor: float | None = None,
    legend: str = "top",
    w: int = 420,
    h: int = 250,
) -> dict:
    """Lines over one axis. Each series: y, colour, and optionally label, width, dash, opacity, fill (down to `base`).

    Shapes      x [T], each y [T] -> a panel; a series that ends before the others brings its own x; `cursor` puts a
                draggable line at that x; `legend` is where on the right the labels stand, "top" or "bottom"
    """
    lines = []
    for one in series:
        y = np.asarray(one["y"], dtype=float)
        own = one.get("x", x)
        if len(y) != len(own):
            raise ValueError(
                f"expected {len(own)} values in each series, got {len(y)} in {one.get('label', 'one')!r}."
            )
        lines.append(
            dict(
                x=_list(own) if "x" in one else None,
                y=_list(y),
                color=one["colour"],
                label=one.get("label"),
                width=one.get("width", 1.5),
                dash=one.get("dash"),
                opacity=one.get("opacity", 1),
                fill=bool(one.get("fill")),
                base=one.get("base", 0),
            )
        )
    everything = np.concatenate([np.asarray(one["y"], dtype=float).ravel() for one in series])
    return dict(
        kind="curves",
        title=title,
        xlabel=xlabel,
        ylabel=ylabel,
        alt=alt,
        xlog=xlog,
        ylog=ylog,
        x=_list(x),
        xrange=_range(x, xrange if xrange is not None else (min(x), max(x))),
        yrange=_range(everything, yrange, ylog),
        series=lines,
        cursor=None if cursor is None else float(_finite(cursor)),
        legend=legend,
        w=w,
        h=h,
    )


def bars(
    labels: Sequence[str],
    values,
    *,
    title: str,
    alt: str,
    colours: Sequence[str],
    range=(0, 1),
    xlabel: str = "",
    texts: Sequence[str] | None = None,
    marks=None,
    w: int = 320,
    h: int = 190,
) -> dict:
    """One bar for each class; `marks` draws a second value as a line across the bar. Shapes: values [K] -> a panel."""
    return dict(
        kind="bars",
        title=title,
        alt=alt,
        labels=[str(v) for v in labels],
        values=_list(values),
        colors=list(colours),
        range=_range(values, range),
        xlabel=xlabel,
        w=w,
        h=h,
        texts=None if texts is None else list(texts),
        marks=None if marks is None else _list(marks),
    )


def tiles(
    images: Sequence,
    *,
    title: str,
    alt: str,
    columns: int,
    size: int = 64,
    captions: Sequence[str] | None = None,
    borders: Sequence[str | None] | None = None,
    pick: bool = False,
    low: float = 0.0,
    high: float = 1.0,
) -> dict:
    """A grid of small images with captions; `pick` makes them buttons. Shapes: each image [C,H,W] -> a panel."""
    return dict(
        kind="tiles",
        title=title,
        alt=alt,
        columns=columns,
        size=size,
        pick=pick,
        images=[picture(image, low, high) for image in images],
        captions=None if captions is None else list(captions),
        borders=None if borders is None else list(borders),
    )


def words(text: str, *, title: str, w: int = 320, h: int = 200) -> dict:
    """A sentence in the place of a figure that cannot be drawn, or not yet: what is missing, and why."""
    return dict(kind="words", title=title, alt=f"{title}: {text}", text=text, w=w, h=h)


def heat(
    values,
    *,
    labels: Sequence[str],
    colours: Sequence[str],
    limit: float,
    ticks: Sequence[tuple[float, str]],
    title: str,
    xlabel: str,
    alt: str,
    w: int = 520,
    h: int = 260,
) -> dict:
    """A row of cells for each class: blue below zero, clear at zero, orange above, grey for NaN.

    Shapes      values [K,N], K labels with K colours; ticks: (share of the width, text); the full colour at +-limit
    Errors      ValueError for infinite values, or labels and colours of another number
    """
    array = np.asarray(values, dtype=float)
    if not len(array) == len(labels) == len(colours):
        raise ValueError(
            f"expected a label and a colour for each of {len(array)} rows, got {len(labels)} and {len(colours)}."
        )
    share = np.clip(_finite(np.nan_to_num(array, posinf=np.inf, neginf=-np.inf)) / limit, -1, 1)
    ends = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (BEST, WRONG)]
    towards = np.where(share[..., None] < 0, ends[0], ends[1])
    cells = np.concatenate([towards, 255 * np.abs(share)[..., None]], -1)
    cells[np.isnan(array)] = [*(int(UNKNOWN[i : i + 2], 16) for i in (1, 3, 5)), 255]
    return dict(
        kind="heat",
        title=title,
        alt=alt,
        image=picture(cells.round().astype(np.uint8)),
        labels=[str(label) for label in labels],
        colors=list(colours),
        ticks=[[float(at), str(text)] for at, text in ticks],
        xlabel=xlabel,
        w=w,
        h=h,
    )


def lamps(
    rows: Sequence[dict], *, title: str, alt: str, chosen: int | None = None, w: int = 520
) -> dict:
    """Rows of coloured discs that can be clicked; each has a sign in it, so that colour is not all that tells.

    Shapes      each row: label, lamps as (name, sign, colour), numbered through all rows; `chosen` has a ring around it
    """
    listed = [
        dict(label=row["label"], lamps=[list(map(str, lamp)) for lamp in row["lamps"]])
        for row in rows
    ]
    return dict(
        kind="lamps", title=title, alt=alt, rows=listed, chosen=chosen, w=w, h=6 + 46 * len(listed)
    )


def plane(
    *,
    title: str,
    alt: str,
    handle=None,
    backdrop: str | None = None,
    dots=(),
    dot_colours=(),
    markers=(),
    lines=(),
    ring=None,
    limit: float = 1.0,
    size: int = 280,
) -> dict:
    """The plane of model space, [-limit, limit]^2, with a draggable handle.

    Shapes      handle (x, y); dots [N,2] with N colours; markers (x, y, colour, label); lines (x1, y1, x2, y2, colour);
                ring (x, y, radius); `backdrop` names an image that the stage already has
    """
    return dict(
        kind="plane",
        title=title,
        alt=alt,
        backdrop=backdrop,
        limit=limit,
        w=size,
        h=size,
        handle=None if handle is None else _list(handle),
        dots=[[*_list(d, 4), c] for d, c in zip(dots, dot_colours, strict=True)],
        markers=[[*_list(m[:2]), *m[2:]] for m in markers],
        lines=[[*_list(l[:4]), *l[4:]] for l in lines],
        ring=None if ring is None else _list(ring),
    )


def radius_axis(
    rows: Sequence[dict],
    *,
    title: str,
    alt: str,
    xlabel: str,
    range: tuple[float, float],
    w: int = 760,
) -> dict:
    """Lower bound, unknown, upper bound on one axis.

    Shapes      each row: label, certified (lower bound, or 0), attacked (upper bound, or None when no attack was found)
    """
    drawn = []
    for row in rows:
        certified = float(_finite(row["certified"]))
        attacked = None if row.get("attacked") is None else float(_finite(row["attacked"]))
        last = float(range[1])
        end = last if attacked is None else attacked
        segments = [
            _segment(0.0, certified, COLOURS[2], "certified", "white"),
            _segment(certified, end, UNKNOWN, "unknown", "#222"),
            _segment(end, last, COLOURS[4], "an attack exists", "white"),
        ]
        marks = [dict(at=v, text=f"{v:.2f}") for v in (certified, attacked) if v]
        drawn.append(dict(label=row["label"], segments=segments, marks=marks))
    return dict(
        kind="radius",
        title=title,
        alt=alt,
        rows=drawn,
        xlabel=xlabel,
        range=_range((), range),
        w=w,
        h=54 + 46 * len(drawn),
    )


def _segment(start: float, end: float, colour: str, text: str, ink: str) -> dict:
    """A stretch of an axis; `ink` is the colour of its text."""
    return {"from": start, "to": end, "color": colour, "text": text, "ink": ink}


def mixture_backdrop(shares, resolution: int, strength: float = 0.55) -> dict:
    """A picture of who owns the plane: each pixel blends the class colours by their posterior shares, half clear.

    Shapes      shares [resolution*resolution, K], row 0 at the top left -> an image for `plane(backdrop=...)`
    """
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS])
    owners = _finite(shares)
    blend = owners @ palette[: owners.shape[1]]
    faded = np.insert(blend, 3, 255 * strength, axis=1)
    return picture(faded.reshape(resolution, resolution, 4).astype(np.uint8))


def frame(rows: Sequence[Sequence[dict]], note: str = "") -> dict:
    """What the stage shows: rows of panels that belong side by side, and one line of HTML that a screen reader reads out.

    Meaning     a row fills the width, and its panels share it in proportion to their widths; a narrow view breaks rows
    Shapes      panels, row by row, -> panels: all of them in one list; rows: how many of them are in each row
    """
    rows = [list(row) for row in rows]
    panels = [panel for row in rows for panel in row]
    return dict(panels=panels, rows=[len(row) for row in rows], note=note)
