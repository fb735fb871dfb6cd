"""Plots of a layer's words as inline SVG with the page's colours and font.

Matplotlib draws with placeholder colours, which become CSS variables of the page, so that one plot serves light and
dark. `Figure` alone is used: pyplot keeps global state.

Legend: M cells of an image, K words.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

_COLOURS = {  # what matplotlib draws with, and the page's variable
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--one)",
    "#010207": "var(--two)",
}
_INK, _MUTED, _LINE, _ONE, _TWO = _COLOURS
_SIZE_INCHES = (4.9, 2.9)
_POINTS = 300  # of a curve over all words
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bowstore",  # the same plot gives the same bytes
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}


def rank_frequency(count_K: NDArray[np.int64], document_frequency_K: NDArray[np.int64], name: str) -> str:
    """Cells and images that hold a word over the word's rank, both logarithmic; as SVG.

    Args:
        count_K: int64, cells that hold each word.
        document_frequency_K: int64, images that hold each word.
        name: unique on the page.
    """
    with _figure(name) as (svg, axes):
        for values_K, colour, label in ((count_K, _ONE, "cells"), (document_frequency_K, _TWO, "images")):
            falling = np.sort(values_K[values_K > 0])[::-1]
            ranks = np.unique(np.geomspace(1, len(falling), _POINTS).round().astype(np.int64))
            axes.plot(ranks, falling[ranks - 1], color=colour, label=label, linewidth=1.6)
        even = count_K.sum() / len(count_K)
        axes.axhline(even, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label="cells, all words used evenly")
        axes.set(xscale="log", yscale="log", xlabel="rank of the word", ylabel="held by")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(10))
            axis.set_major_formatter(_NUMBERS)
            axis.set_minor_formatter(NullFormatter())
        lowest = document_frequency_K[document_frequency_K > 0].min()
        axes.set_ylim(bottom=max(0.8, lowest / 20))  # room for the legend
        axes.legend(loc="lower left")
    return svg[0]


def distinct_words(distinct: NDArray[np.int64], name: str) -> str:
    """Histogram of the number of distinct words an image holds; as SVG.

    Args:
        distinct: int64 (M + 1,), images by that number.
        name: unique on the page.
    """
    first, last = np.flatnonzero(distinct)[[0, -1]].tolist()
    width = -(-(last - first + 1) // 60)  # no more than 60 bars
    edges = np.arange(first, last + width + 1, width)
    heights = np.histogram(np.arange(len(distinct)), edges, weights=distinct)[0]
    median = int(np.searchsorted(np.cumsum(distinct), distinct.sum() / 2))
    with _figure(name) as (svg, axes):
        axes.stairs(heights, edges - 0.5, color=_ONE, fill=True, alpha=0.75, linewidth=0)
        axes.axvline(median, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        right = median > (first + last) / 2
        axes.annotate(
            f"median {median}",
            (median, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if right else 5, -4),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
        )
        axes.margins(y=0.15)
        axes.set(xlabel=f"distinct words of an image, of {len(distinct) - 1} cells", ylabel="images")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(_NUMBERS)
    return svg[0]


def inertia(history: Sequence[float], final: float | None, name: str) -> str:
    """Mean squared distance of the sample to its words over the iterations of k-means; as SVG.

    Args:
        history: before each iteration's move.
        final: with the words as they are; None if it is not known.
        name: unique on the page.
    """
    values = [*history] if final is None else [*history, final]
    with _figure(name) as (svg, axes):
        small = len(values) <= 60
        axes.plot(range(len(values)), values, color=_ONE, linewidth=1.6, marker="o" if small else "", markersize=3)
        axes.set(xlabel="iterations of k-means", ylabel="mean squared distance")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(_NUMBERS)
    return svg[0]


@contextmanager
def _figure(name: str) -> Iterator[tuple[list[str], Axes]]:
    """Axes to draw on; their SVG is in the list once the block has ended."""
    svg: list[str] = []
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        yield svg, figure.add_subplot()
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg.append(_for_page(file.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """Inline SVG: no XML header, the page's colours and font, and unique names."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{name}-", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    # Its size comes from the page.
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="plot" role="img" \1>', svg, count=1)


_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
