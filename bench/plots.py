"""The plots of README and docs/: `python -m bench.plots` draws docs/*.svg from only the committed results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.names import CONVOLUTION, EAGER, FASTUPER, OPENVINO, WITHOUT_AUXILIARY
from bench.results import EXPORTS, TINY, Results, best, load, load_exports, load_training

DOCS = Path(__file__).parent.parent / "docs"
OURS, THEIRS, TEXT, PALE = "#d9480f", "#adb5bd", "#343a40", "#e9ecef"
LINES = {FASTUPER: OURS, "Transformers": "#495057", "without auxiliary head": "#868e96", OPENVINO: "#4c6ef5"}
# Steps of the waterfall whose names in the results need their context.
STEPS = {
    "no auxiliary head": "without auxiliary head",
    "our head as it is": "fastuper's head",
    "our backbone": "fastuper's backbone",
    "the rest: fastuper": "everything else: fastuper",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.hashsalt": "fastuper",  # without it the ids of a drawing are random
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
    """A picture.

    Args:
        name: the name of the file, without its suffix.
        caption: what the picture shows.
        section: the part of the results that it needs, at 512 x 512.
        draw: fills a figure from results.
        of_sizes: the picture also needs images of 1024 x 1024 and peak memory, because one point is no curve.
    """

    name: str
    caption: str
    section: str
    draw: Callable[[Any, Results], None]
    of_sizes: bool = False

    def drawable(self, results: Results) -> bool:
        """Return True if the results hold everything that the picture needs."""
        larger = all(f"{self.section} {key} 1024 float32" in results["tasks"] for key in TINY)
        return bool(tasks(results, self.section)) and (not self.of_sizes or bool(larger and results["memory"]))


def tasks(results: Results, part: str) -> dict[str, str]:
    """Return the measured tasks of a part at 512 x 512 in float32: the backbone's title by task name."""
    names = {f"{part} {key} 512 float32": title for key, title in TINY.items()}
    return {name: title for name, title in names.items() if name in results["tasks"]}


def label_bars(axes: Any, bars: Any, labels: list[str]) -> None:
    axes.bar_label(bars, labels=labels, padding=4, fontsize=8)
    axes.set_xlim(0, 1.4 * max(bar.get_width() for bar in bars))  # room for the labels


def peer_times(results: Results, task: str) -> dict[str, float]:
    """Return the median seconds of each library and mode, each in its faster memory layout, under a short name."""
    found: dict[str, float] = {}
    for peer, row in results["tasks"][task]["peers"].items():
        if "rounds" not in row or peer == CONVOLUTION:
            continue
        name = peer.removesuffix(", channels_last").replace("segmentation_models_pytorch", "smp")
        name = name.replace("compiled", "torch.compile").replace(", no auxiliary", " without auxiliary")
        found[name] = min(median(row["rounds"]), found.get(name, float("inf")))
    return found


def peers(figure: Any, results: Results) -> None:
    """Draw a panel for each backbone, and in it a bar for each peer; the fastest for the first backbone is on top."""
    found = tasks(results, "logits")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    measured = {title: peer_times(results, name) for name, title in found.items()}
    first = next(iter(measured.values()))
    order = sorted(set().union(*measured.values()), key=lambda peer: (-first.get(peer, 0.0), peer))
    for axes, (title, times) in zip(panels, measured.items(), strict=True):
        ours = times.get(FASTUPER)
        values = [times.get(peer, 0.0) for peer in order]
        colours = [OURS if peer.startswith(FASTUPER) else THEIRS for peer in order]
        ratios = [f"  ({time / ours:.1f} x)" if ours and time != ours else "" for time in values]
        labels = [f"{time:.2f} s{ratio}" if time else "" for time, ratio in zip(values, ratios, strict=True)]
        label_bars(axes, axes.barh(order, values, color=colours, height=0.7), labels)
        axes.set_title(f"{title}, 512 x 512, float32", fontsize=10)
        axes.set_xlabel("seconds for the logits")
        axes.tick_params(axis="y", length=0)


def sizes(figure: Any, results: Results) -> None:
    """Draw time and memory against the side of the image, a row of panels for each backbone."""
    from matplotlib import ticker

    found = tasks(results, "logits")
    panels = figure.subplots(len(found), 2, squeeze=False)
    rows = {FASTUPER: [FASTUPER], "Transformers": EAGER, OPENVINO: [OPENVINO]}
    memory = {
        FASTUPER: FASTUPER,
        "Transformers": EAGER[0],
        "without auxiliary head": WITHOUT_AUXILIARY[0],
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
            (time_axes, "seconds for the logits"),
            (memory_axes, "peak GB over the weights"),
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
    """Draw a bar for each step; the time that the step saved is pale; the error is beside the time."""
    found = tasks(results, "waterfall")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (name, title) in zip(panels, found.items(), strict=True):
        rows = {step: row for step, row in results["tasks"][name]["peers"].items() if "rounds" in row}
        steps, times = [STEPS.get(step, step) for step in rows], [median(row["rounds"]) for row in rows.values()]
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
        if axes is panels[0]:  # the panels share this axis
            axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(times))
        axes.set_title(f"{title}, 512 x 512, float32", fontsize=10)
        axes.set_xlabel("seconds for the logits")
        axes.tick_params(axis="y", length=0)


PLOTS = [
    Plot(
        "bench-peers",
        "Seconds for the logits of one image, each library in its faster memory layout "
        "(smp: segmentation_models_pytorch)",
        "logits",
        peers,
    ),
    Plot(
        "bench-sizes",
        "Time and peak memory against the size of the image (solid: logits, dotted: label maps)",
        "logits",
        sizes,
        of_sizes=True,
    ),
    Plot("bench-waterfall", "The gain of each technique: each step keeps the steps above it", "waterfall", waterfall),
]
SHAPES = {"bench-peers": (10, 3.8), "bench-sizes": (9, 6.4), "bench-waterfall": (11, 3.8)}


def training(figure: Any, result: dict[str, Any]) -> None:
    """Draw seconds and peak memory of a training step, from bench.training's results: two bars for each backbone."""
    values = {
        "seconds for a step": lambda peer: median(peer["rounds"]),
        "peak GB over the weights": lambda peer: peer["peak"] / 1e9,
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


def exports(figure: Any, result: dict[str, Any]) -> None:
    """Draw a panel for each backbone, from bench.exports' results: two bars for each row of its table."""
    panels = figure.subplots(1, len(result["rows"]), squeeze=False, sharey=True)[0]
    for axes, (key, row) in zip(panels, result["rows"].items(), strict=True):
        names = [name for known in EXPORTS[:6] for name in (known.before, known.after)][::-1]
        times = [median(row["peers"].get(name, {}).get("rounds", [0.0])) for name in names]
        colours = [OURS if name.startswith(FASTUPER) else THEIRS for name in names]
        bars = axes.barh(names, times, color=colours, height=0.7)
        label_bars(axes, bars, [f"{time:.2f} s" if time else "" for time in times])
        axes.set_title(f"{TINY[key]}, {row['size']} x {row['size']}", fontsize=10)
        axes.set_xlabel("seconds")
        axes.tick_params(axis="y", length=0)


def draw(results: Results, folder: Path = DOCS) -> list[Path]:
    """Write every plot whose measurements the results hold, and return the files."""
    drawable = [plot for plot in PLOTS if plot.drawable(results)]
    return [picture(folder / f"{plot.name}.svg", SHAPES[plot.name], plot.draw, results) for plot in drawable]


def draw_training(result: dict[str, Any], folder: Path = DOCS) -> Path:
    """Write the picture of bench.training's results, and return the file."""
    return picture(folder / "training.svg", (9, 2.4), training, result)


def draw_exports(result: dict[str, Any], folder: Path = DOCS) -> Path:
    """Write the picture of bench.exports' results, and return the file."""
    return picture(folder / "exports.svg", (11, 3.9), exports, result)


def picture(path: Path, shape: tuple[float, float], fill: Callable[[Any, Any], None], results: Any) -> Path:
    """Write an SVG whose bytes depend only on the results and on matplotlib's version; return its path."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=shape, layout="constrained", facecolor="white")
        fill(figure, results)
        figure.savefig(path, metadata={"Date": None})  # "Creator" stays: matplotlib and its version
        pyplot.close(figure)
    return path


if __name__ == "__main__":
    newest, trained = load(), load_training()
    for path in draw(newest) if newest is not None else []:
        print(path.name)
    if trained is not None:
        print(draw_training(trained).name)
    if (exported := load_exports()) is not None:
        print(draw_exports(exported).name)
