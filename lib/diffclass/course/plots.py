"""The scoreboard as figures that can be touched: plotly, everything offline, and no point where there is no number."""

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from diffclass.course.figures import COLOURS
from diffclass.course.scenes.overview import Dot
from diffclass.evaluation import literature, scoreboard
from diffclass.evaluation.scoreboard import Comparison, Measure, Number, Standing

GRID = "#D9D9D9"
ROW_HEIGHT = 34  # pixels
FEW = 8  # columns of a table, whose cells then hold two lines at most
TIGHT = 46  # pixels of a row of a table with more
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
OFFLINE = dict(displaylogo=False, responsive=True)


def _figure(**layout) -> go.Figure:
    """An empty figure in the course's style."""
    common = dict(
        template="simple_white",
        margin=dict(l=10, r=20, t=50, b=50),
        font=dict(size=12),
        legend=dict(orientation="h", yanchor="bottom", y=1.01, x=1, xanchor="right"),
    )
    return go.Figure(layout=common | layout)


def _measures() -> dict[str, Measure]:
    return {measure.title: measure for measure in scoreboard.measures()}


def points(labelled: Sequence[tuple[str, Number]]) -> dict:
    """What a trace of accuracies with intervals shows: those that have a number, in percent.

    Shapes      pairs of a label and its number -> values of a plotly scatter: x, y, error bars, hover text
    """
    present = [(label, number) for label, number in labelled if number.value is not None]
    return dict(
        x=[100 * number.value for _, number in present],
        y=[label for label, _ in present],
        error_x=dict(
            type="data",
            symmetric=False,
            array=[100 * (number.high - number.value) for _, number in present],
            arrayminus=[100 * (number.value - number.low) for _, number in present],
        ),
        text=[_hover(label, number) for label, number in present],
    )


def _hover(label: str, number: Number) -> str:
    value = f"{100 * number.value:.1f} % [{100 * number.low:.1f}, {100 * number.high:.1f}]"
    return f"{label}<br>{value}, {number.n} pictures"


def _labels(series: dict[str, Sequence[tuple[str, Number]]]) -> dict[str, str]:
    """Label -> what stands at its row: with the reason where no series has a number."""
    known = {}
    for rows in series.values():
        for label, number in rows:
            if number.value is not None:
                known[label] = label
            else:
                known.setdefault(label, f"{label} ({number.reason})")
    return known


def axis_of(labels: Sequence[str]) -> dict:
    """A vertical axis with a row for each label, the first one on top. Shapes: -> plotly's layout of an axis."""
    return dict(
        type="category",
        categoryorder="array",
        categoryarray=list(labels)[::-1],
        range=[-0.7, len(labels) - 0.3],
        automargin=True,
    )


def forest(series: dict[str, Sequence[tuple[str, Number]]], title: str) -> go.Figure:
    """Accuracies with their intervals, a row for each label in the given order, a colour for each series.

    Meaning     a label without a number keeps its row, which says why, and gets no point
    """
    labels = _labels(series)
    order = list(labels.values())
    figure = _figure(
        title=title,
        height=120 + ROW_HEIGHT * len(order),
        xaxis=dict(
            title="percent of pictures, 95 % interval",
            range=[-2, 102],
            gridcolor=GRID,
            showgrid=True,
        ),
        yaxis=axis_of(order),
    )
    for place, (name, rows) in enumerate(series.items()):
        named = [(labels[label], number) for label, number in rows]
        figure.add_scatter(
            name=name,
            mode="markers",
            marker=dict(
                color=COLOURS[place % len(COLOURS)],
                symbol=SYMBOLS[place % len(SYMBOLS)],
                size=10,
            ),
            hovertemplate="%{text}<extra></extra>",
            **points(named),
        )
    return figure


def against_cost(rows: Sequence[Standing], title: str, cost: str = "flop") -> go.Figure:
    """One accuracy over what an answer costs; classifiers that lack one of the two are counted in the title, not drawn at 0.

    Errors      KeyError for a column that no scoreboard has
    """
    measure = _measures()[cost]
    present = [
        row
        for row in rows
        if row.numbers[title].value is not None and row.numbers[cost].value is not None
    ]
    absent = len(rows) - len(present)
    figure = _figure(
        title=f"{title}, over the cost of one answer ({absent} of {len(rows)} not measured)",
        height=460,
        legend=dict(orientation="v", x=1.01, y=1, xanchor="left", yanchor="top"),
        xaxis=dict(
            title=f"{cost} of one answer ({measure.unit})",
            type="log",
            dtick=1,
            range=_decades([row.numbers[cost].value for row in present]),
            showgrid=True,
        ),
        yaxis=dict(title=f"{title}, percent", range=[-4, 104], gridcolor=GRID, showgrid=True),
    )
    for place, row in enumerate(present):
        number = row.numbers[title]
        figure.add_scatter(
            name=row.title,
            x=[row.numbers[cost].value],
            y=[100 * number.value],
            error_y=dict(
                type="data",
                symmetric=False,
                array=[100 * (number.high - number.value)],
                arrayminus=[100 * (number.value - number.low)],
                thickness=1,
            ),
            mode="markers",
            marker=dict(
                color=COLOURS[place % len(COLOURS)],
                symbol=SYMBOLS[place // len(COLOURS) % len(SYMBOLS)],
                size=10,
            ),
            hovertext=[_hover(row.title, number)],
            hoverinfo="text",
        )
    return figure


def _decades(values: Sequence[float]) -> list[float]:
    """The ends of a logarithmic axis, with room on both sides."""
    if not values:
        return [0.0, 1.0]
    return [math.log10(min(values)) - 0.2, math.log10(max(values)) + 0.2]


def pairs(listed: Sequence[Comparison], title: str) -> go.Figure:
    """Differences of pairs on the same pictures, with their intervals; those that leave 0 out are filled."""
    labels = [f"{pair.first} - {pair.second} ({pair.n})" for pair in listed]
    figure = _figure(
        title=title,
        height=120 + ROW_HEIGHT * len(listed),
        showlegend=False,
        xaxis=dict(title="points, 95 % interval of the paired difference", showgrid=True),
        yaxis=axis_of(labels),
    )
    figure.add_vline(x=0, line=dict(color="black", width=1))
    figure.add_scatter(
        x=[100 * pair.difference for pair in listed],
        y=labels,
        error_x=dict(
            type="data",
            symmetric=False,
            array=[100 * (pair.high - pair.difference) for pair in listed],
            arrayminus=[100 * (pair.difference - pair.low) for pair in listed],
        ),
        mode="markers",
        marker=dict(
            color=COLOURS[0],
            size=10,
            symbol=["circle" if pair.real else "circle-open" for pair in listed],
        ),
        text=[pair.remark or "measured alike" for pair in listed],
        hovertemplate="%{y}: %{x:.1f} points<br>%{text}<extra></extra>",
    )
    return figure


def surface(
    first: Sequence[float], second: Sequence[float], heights, titles: tuple[str, str, str]
) -> go.Figure:
    """A loss over two directions. Shapes: first [A], second [B], heights [B,A]; titles of the three axes."""
    figure = _figure(
        height=560,
        margin=dict(l=0, r=0, t=10, b=10),
        scene=dict(
            xaxis_title=titles[0],
            yaxis_title=titles[1],
            zaxis_title=titles[2],
            aspectmode="cube",
            camera_eye=dict(x=1.5, y=1.5, z=1.1),
        ),
    )
    figure.add_surface(
        x=list(first),
        y=list(second),
        z=[list(map(float, row)) for row in heights],
        colorscale="RdBu",
        cmid=0,
        colorbar=dict(title=titles[2]),
    )
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def dots(listed: Sequence[Dot], title: str) -> go.Figure:
    """The pictures of a record: lead of the label when clean against its lead when changed; two traces, stood and fell.

    Meaning     a dot's `customdata` is its picture's place in the data set, which a click can open
    """
    figure = _figure(
        title=title,
        autosize=True,
        height=380,
        xaxis_title="lead of the label on the clean picture (as the logits count)",
        yaxis_title="lead on the changed one",
        hovermode="closest",
    )
    for name, colour, symbol, stood in (
        ("stood at most draws", COLOURS[0], "circle", True),
        ("fell", COLOURS[4], "x", False),
    ):
        chosen = [dot for dot in listed if (dot.standing > 0.5) == stood]
        figure.add_scatter(
            x=[dot.clean for dot in chosen],
            y=[dot.attacked for dot in chosen],
            customdata=[dot.index for dot in chosen],
            text=[
                f"picture {dot.index}, class {dot.label}: {100 * dot.standing:.0f} % of the draws stood (click to open)"
                for dot in chosen
            ],
            hovertemplate="%{text}<extra></extra>",
            mode="markers",
            name=name,
            marker=dict(color=colour, symbol=symbol, size=8, opacity=0.75),
        )
    figure.add_hline(0, line=dict(color=GRID, dash="dot"))
    return figure


def table(rows: Sequence[Standing], titles: Sequence[str], by: str) -> go.Figure:
    """A table with a menu: all classifiers by any of the columns, or only those that have a number in it."""
    known = _measures()

    def cells(column: str, complete: bool) -> list[list[str]]:
        order = scoreboard.ranked(rows, column)
        kept = [row for row in order if not complete or row.numbers[column].value is not None]
        body = [
            [scoreboard.spoken(row.numbers[title], known[title]) for row in kept]
            for title in titles
        ]
        return [[row.title for row in kept], *body]

    choices = [(column, complete) for complete in (False, True) for column in titles]
    choices.remove((by, False))
    buttons = [
        dict(
            label=f"{'only those with' if complete else 'all, by'} {column}",
            method="restyle",
            args=[{"cells.values": [cells(column, complete)]}],
        )
        for column, complete in [(by, False), *choices]
    ]
    figure = _figure(
        height=140 + (TIGHT if len(titles) > FEW else ROW_HEIGHT) * len(rows),
        margin=dict(l=5, r=5, t=60, b=5),
        updatemenus=[dict(buttons=buttons, x=0, xanchor="left", y=1, yanchor="bottom")],
    )
    figure.add_table(
        columnwidth=[2.2] + [1.3] * len(titles),
        header=dict(values=["classifier", *titles], align="left", fill_color="#EEEEEE"),
        cells=dict(values=cells(by, False), align="left", height=22),
    )
    return figure


def claims_table(claims: Sequence[literature.Claim]) -> go.Figure:
    """Published numbers with where they stand, how they are known here, and what to know beside them."""
    columns = {
        "paper": [claim.paper for claim in claims],
        "of": [claim.method for claim in claims],
        "metric": [claim.metric for claim in claims],
        "threat": [_threat(claim) for claim in claims],
        "value": [f"{claim.value:g} {claim.unit}" for claim in claims],
        "images": ["not said" if claim.n is None else f"{claim.n:,}" for claim in claims],
        "protocol": [claim.protocol for claim in claims],
        "known": [claim.provenance for claim in claims],
        "caveat": [claim.caveat for claim in claims],
    }
    figure = _figure(height=520, margin=dict(l=5, r=5, t=20, b=5))
    figure.add_table(
        columnwidth=[1, 1.6, 1.2, 0.9, 0.8, 0.7, 1.6, 0.9, 4],
        header=dict(values=list(columns), align="left", fill_color="#EEEEEE"),
        cells=dict(values=list(columns.values()), align="left"),
    )
    return figure


def _threat(claim: literature.Claim) -> str:
    return "" if claim.threat is None else f"{claim.threat['norm']} {claim.threat['epsilon']}"


# ---------------------------------------------------------------------------------------------------------------------
# One page


STYLE = "body{font:15px/1.5 sans-serif;max-width:1250px;margin:24px auto;padding:0 16px}h1{font-size:24px}h2{font-size:19px}"


def page(world: str) -> str:
    """The scoreboard of a world as one HTML page that needs nothing else: plotly's code is inside.

    Errors      those of `scoreboard.standings`
    """
    rows = scoreboard.standings(world)
    titles = [measure.title for measure in scoreboard.measures()]
    robust = {
        title: [(row.title, row.numbers[title]) for row in scoreboard.ranked(rows, "honest")]
        for title in ("clean", "honest", "honest, worst of 10")
    }
    found = scoreboard.outcomes(world, "honest")
    sections = [
        (
            "All numbers",
            "Percent with 95 % interval and pictures. Under attack each is an upper bound, certified a lower bound.",
            table(rows, titles, "honest"),
        ),
        (
            "What stands",
            "Upper bounds; what was not measured has no point.",
            forest(robust, "L-inf"),
        ),
        (
            "On the same pictures",
            "Differences of pairs on their common prefix; filled where the interval leaves 0 out.",
            pairs(scoreboard.comparisons(found), "honest protocol"),
        ),
        ("What it costs", "", against_cost(rows, "honest")),
    ]
    if world == "cifar10":
        told = "Other networks, images and protocols than ours: beside our numbers, never in one row with them."
        sections.append(("What is published", told, claims_table(literature.claims())))
    parts = []
    for place, (heading, sentence, figure) in enumerate(sections):
        drawn = figure.to_html(full_html=False, include_plotlyjs=place == 0, config=OFFLINE)
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(sentence)}</p>{drawn}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scoreboard of {world}</title>'
        f"<style>{STYLE}</style></head><body><h1>Scoreboard of {world}</h1>{''.join(parts)}</body></html>\n"
    )
