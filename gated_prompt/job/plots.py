# SPDX-License-Identifier: Apache-2.0
"""Plots of the learned gates and of the data. Uses Figure objects: no pyplot, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_gates(report: Mapping | Sequence[Mapping], path: Path | str) -> None:
    """Draws the gates, the shares of the final prompts and the temperatures of each block as a PNG.

    Args:
        report: The dict from ``model.gate_report()``, or several, each drawn as one line: runs
            differ.
        path: The file to write.
    """
    reports = [report] if isinstance(report, Mapping) else list(report)
    panels = (
        ("gates", "gate, sigmoid of its logit", "block", 1),
        ("selection", "share of the last prompts", "block (0: the initial prompts)", 0),
        ("temperatures", "temperature of the attention", "block", 1),
    )
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle("what was learned")
    for axes, (key, what, where, first) in zip(figure.subplots(1, 3), panels, strict=True):
        for run, values in enumerate((report[key] for report in reports), 1):
            axes.plot(range(first, first + len(values)), values, "o-", label=f"run {run}")
        axes.axhline(0, color="black", linewidth=0.8)  # all axes show 0, so 0.98 looks close to 1
        axes.set(xlabel=where, ylabel=what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if len(reports) > 1:
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)


def plot_scenes(rows: Mapping[str, tuple[Sequence, Sequence]], path: Path | str) -> None:
    """Draws rows of grey pictures as a PNG.

    Args:
        rows: {name of a row: (its pictures, each [H, W], and the titles above them)}. The titles
            may be empty.
        path: The file to write.
    """
    columns = max(len(pictures) for pictures, _ in rows.values())
    figure = Figure(figsize=(1 + columns, 1.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, (pictures, titles)) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        for axes, title in zip(line, titles, strict=False):
            axes.set_title(str(title), fontsize=9)
    FigureCanvasAgg(figure).print_png(path)
