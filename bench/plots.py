"""The plots of README, drawn from the committed results alone: `python -m bench.plots` writes docs/bench-*.svg."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.names import CONVOLUTION, EAGER, FASTUPER, OPENVINO, WITHOUT_AUXILIARY
from bench.results import TINY, Results, best, load, load_training

DOCS = Path(__file__).parent.parent / "docs"
OURS, THEIRS, TEXT, PALE = "#d9480f", "#adb5bd", "#343a40", "#e9ecef"
LINES = {FASTUPER: OURS, "Transformers": "#495057", "auxiliary head taken off": "#868e96", OPENVINO: "#4c6ef5"}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "fastuper",  # else every drawing has other ids
    "svg.fonttype": "none",
    "axes.edgecolor": "#adb5bd",
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Plot:
    """A picture: its file's name, what it shows, what it needs of the results, and what draws it.

    One `of_sizes` needs larger images and memory too: a point alone is no curve.
    """

    name: str
    caption: str
    section: str
    draw: Callable[[Any, Results], None]
    of_sizes: bool = False

    def drawable(self, results: Results) -> bool:
        larger = all(f"{self.section} {key} 1024 float32" in results["tasks"] for key in TINY)
        return bool(tasks(results, self.section)) and (not self.of_sizes or bool(larger and results["memory"]))


def tasks(results: Results, part: str) -> dict[str, str]:
    """Return the tasks of a part at 512 in float32 that were measured: title by name."""
    names = {f"{part} {key} 512 float32": title for key, title in TINY.items()}
    return {name: title for name, title in names.items() if name in results["tasks"]}


def label_bars(axes: Any, bars: Any, labels: list[str]) -> None:
    axes.bar_label(bars, labels=labels, padding=4, fontsize=8)
    axes.set_xlim(0, 1.7 * max(bar.get_width() for bar in bars))  # room for the labels


def peers(figure: Any, results: Results) -> None:
    """One panel a backbone; the fastest on top."""
    found = tasks(results, "logits")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, title) in zip(panels, found.items(), strict=True):
        rows = results["tasks"][name]["peers"]
        times = {peer: median(row["rounds"]) for peer, row in rows.items() if "rounds" in row and peer != CONVOLUTION}
        # Each library and mode once, in its faster layout.
        merged: dict[str, float] = {}
        for peer, time in times.items():
            plain = peer.removesuffix(", channels_last").replace("segmentation_models_pytorch", "smp")
            merged[plain] = min(time, merged.get(plain, time))
        order = sorted(merged, key=lambda peer: -merged[peer])
        ours = merged.get(FASTUPER)
        colours = [OURS if peer.startswith(FASTUPER) else THEIRS for peer in order]
        bars = axes.barh(order, [merged[peer] for peer in order], color=colours, height=0.7)
        label_bars(
            axes,
            bars,
            [
                f"{merged[peer]:.2f} s" + (f"  ({merged[peer] / ours:.1f} x)" if ours and peer != FASTUPER else "")
                for peer in order
            ],
        )
        axes.set_title(f"{title}, 512 x 512, float32", fontsize=10)
        axes.set_xlabel("seconds for full logits")
        axes.tick_params(axis="y", length=0)


def sizes(figure: Any, results: Results) -> None:
    """Time and memory against the image's side; a row a backbone."""
    from matplotlib import ticker

    found = tasks(results, "logits")
    panels = figure.subplots(len(found), 2, squeeze=False)
    rows = {FASTUPER: [FASTUPER], "Transformers": EAGER, OPENVINO: [OPENVINO]}
    memory = {
        FASTUPER: FASTUPER,
        "Transformers": EAGER[0],
        "auxiliary head taken off": WITHOUT_AUXILIARY[0],
    }
    for (time_axes, memory_axes), (key, title) in zip(
        panels, ((k, t) for k, t in TINY.items() if t in found.values()), strict=True
    ):
        for label, names in rows.items():
            points = [(n, best(results, f"logits {key} {n} float32", names)) for n in (512, 1024, 2048)]
            line(time_axes, label, [(n, time) for n, time in points if time is not None])
        for label, name in memory.items():
            for part, style in (("logits", "-"), ("labels", ":")):
                entries = [(n, results["memory"].get(f"{part} {key} {n} float32", {})) for n in (512, 1024, 2048)]
                peaks = [(n, entry.get("peers", {}).get(name, {}).get("peak")) for n, entry in entries]
                line(
                    memory_axes,
                    label if part == "logits" else "_" + label,
                    [(n, peak / 1e9) for n, peak in peaks if peak],
                    style,
                )
        for axes, unit in (
            (time_axes, "seconds for full logits"),
            (memory_axes, "GB over the weights (dotted: label maps)"),
        ):
            axes.set(xscale="log", yscale="log", ylabel=unit, xlabel="side of the image")
            axes.set_xticks([512, 1024, 2048], ["512", "1024", "2048"])
            axes.set_xticks([], minor=True)
            axes.set_xlim(460, 2280)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.grid(axis="y", color=PALE, linewidth=0.6)
            axes.set_title(title, fontsize=10)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=7.5, loc="upper left")


def line(axes: Any, label: str, points: list[tuple[int, float]], style: str = "-") -> None:
    if points:
        colour = LINES[label.removeprefix("_")]  # matplotlib leaves names with an underscore out of the legend
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=label)


def waterfall(figure: Any, results: Results) -> None:
    """A bar a step; what the step saved is pale; the error beside the time."""
    found = tasks(results, "waterfall")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (name, title) in zip(panels, found.items(), strict=True):
        rows = {step: row for step, row in results["tasks"][name]["peers"].items() if "rounds" in row}
        steps, times = list(rows), [median(row["rounds"]) for row in rows.values()]
        before = [times[0], *times[:-1]]
        axes.barh(
            steps, [max(a - b, 0) for a, b in zip(before, times, strict=True)], left=times, color=PALE, height=0.7
        )
        colours = [OURS if i == len(steps) - 1 else THEIRS for i in range(len(steps))]
        axes.barh(steps, times, color=colours, height=0.7)
        for step, row, time, last in zip(steps, rows.values(), times, before, strict=True):
            error = f", error {row['error']:.1e}".replace("e-0", "e-") if "error" in row else ""
            axes.annotate(
                f"{time:.2f} s{error}",
                (max(time, last), step),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        if axes is panels[0]:  # the panels share it
            axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(times))
        axes.set_title(f"{title}, 512 x 512, float32", fontsize=10)
        axes.set_xlabel("seconds for full logits")
        axes.tick_params(axis="y", length=0)


PLOTS = [
    Plot(
        "bench-peers",
        "Seconds for full logits, each library in its faster layout (smp: segmentation_models_pytorch)",
        "logits",
        peers,
    ),
    Plot(
        "bench-sizes",
        "Time and peak memory against the size of the image (dotted: label maps)",
        "logits",
        sizes,
        of_sizes=True,
    ),
    Plot("bench-waterfall", "Which idea brought what: each step keeps those above it", "waterfall", waterfall),
]
SHAPES = {"bench-peers": (10, 3.8), "bench-sizes": (9, 6.4), "bench-waterfall": (11, 3.8)}


def training(figure: Any, result: dict[str, Any]) -> None:
    """Seconds and peak memory of a step, of bench.training's results: a pair of bars a backbone."""
    values = {
        "seconds for a step": lambda peer: median(peer["rounds"]),
        "GB over the weights, at most": lambda peer: peer["peak"] / 1e9,
    }
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (label, value) in zip(panels, values.items(), strict=True):
        names, numbers = [], []
        for key, row in reversed(result["backbones"].items()):
            found = {peer: value(measured) for peer, measured in row["peers"].items()}
            names += [f"{FASTUPER}, {TINY[key]}", f"Transformers, {TINY[key]}"]
            numbers += [found[FASTUPER], min(found[peer] for peer in EAGER)]
        bars = axes.barh(names, numbers, color=[OURS, THEIRS] * len(result["backbones"]), height=0.7)
        label_bars(axes, bars, [f"{number:.2f}" for number in numbers])
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(
        f"A training step on {result['batch']} images of {result['size']} x {result['size']}, {result['dtype']}",
        fontsize=10,
    )


def draw(results: Results, folder: Path = DOCS) -> list[Path]:
    """Write every plot that the results suffice for, and return their files."""
    drawable = [plot for plot in PLOTS if plot.drawable(results)]
    return [picture(folder / f"{plot.name}.svg", SHAPES[plot.name], plot.draw, results) for plot in drawable]


def draw_training(result: dict[str, Any], folder: Path = DOCS) -> Path:
    """Write the picture of bench.training's results, and return its file."""
    return picture(folder / "training.svg", (9, 2.4), training, result)


def picture(path: Path, shape: tuple[float, float], fill: Callable[[Any, Any], None], results: Any) -> Path:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=shape, layout="constrained", facecolor="white")
        fill(figure, results)
        figure.savefig(path, metadata={"Date": None})  # its creator is matplotlib, with the version
        pyplot.close(figure)
    return path


if __name__ == "__main__":
    newest, trained = load(), load_training()
    for path in draw(newest) if newest is not None else []:
        print(path.name)
    if trained is not None:
        print(draw_training(trained).name)
