"""A live panel of a service and its Milvus: reads their metrics every second and draws what happened in each."""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ipw
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.prometheus import MetricsError, Reading, read

WINDOW = 5  # readings that one point of a line is made of, so that a line is no noise
STAGES = ("embedding", "vector_search", "context_assembly", "model_first_token", "model_rest")
OUTCOMES = ("completed", "failed", "refused", "aborted")
Line = Callable[[Reading], float]


def _per_second(name: str, **labels: str) -> Line:
    return lambda step: step.total(name, **labels) / step.seconds


def _mean_ms(name: str, unit_ms: float, **labels: str) -> Line:
    return lambda step: unit_ms * step.mean(name, **labels)


def _share(part: str, whole: str, **labels: str) -> Line:
    def share(step: Reading) -> float:
        of = step.total(whole, **labels)
        return step.total(part) / of if of else math.nan

    return share


# Title, unit and lines of each plot: the three views, and below them the layer that searches.
PLOTS: dict[str, tuple[str, dict[str, Line]]] = {
    "Runs": ("runs/s", {name: _per_second("agent_runs_total", outcome=name) for name in OUTCOMES}),
    "Latency by stage": (
        "mean ms",
        {stage.replace("_", " "): _mean_ms("agent_stage_seconds", 1000, stage=stage) for stage in STAGES},
    ),
    "Retrieval and answers": (
        "0 to 1",
        {
            "best score": lambda step: step.mean("agent_best_score"),
            "faithful sentences": lambda step: step.mean("agent_faithfulness"),
            "refused to answer": _share("agent_refusals_total", "agent_runs_total", outcome="completed"),
        },
    ),
    "Milvus": (
        "mean ms",
        {
            "search, in the proxy": _mean_ms("milvus_proxy_sq_latency", 1, query_type="search"),
            "wait in the query node's queue": _mean_ms("milvus_querynode_sq_queue_latency", 1, query_type="search"),
            "work in the query node": _mean_ms("milvus_querynode_sq_core_latency", 1, query_type="search"),
        },
    ),
}


class MonitoringPanel:
    """The panel; a cell that ends with it shows it, and as text the figures of the last seconds.

    Args:
        urls: endpoints of metrics, the app's and Milvus's.
        every: seconds between two readings.
        minutes: how far back it shows.

    Attributes:
        error: why the last reading failed; "" if it did not.
    """

    def __init__(self, urls: Sequence[str], every: float = 1.0, minutes: float = 3) -> None:
        self._urls = tuple(urls)
        self._every = every
        self._readings: deque[Reading] = deque(maxlen=max(WINDOW + 1, math.ceil(60 * minutes / every)))
        self._marks: list[tuple[float, str]] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.error = ""
        self.picture = ipw.Image(format="png", layout=ipw.Layout(max_width="100%"))
        self.message = ipw.HTML()
        self.view = ipw.VBox([self.message, self.picture])

    def start(self) -> MonitoringPanel:
        """Begin to read; nothing happens if it reads already."""
        if self._thread is None:
            self._end.clear()
            self._thread = threading.Thread(target=self._watch, name="monitoring-panel", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the reading; the picture stays."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def mark(self, text: str) -> None:
        """Draw a dotted line at the last reading, with a short text."""
        if self._readings:
            self._marks.append((self._readings[-1].seconds, text))

    def look(self) -> None:
        """Read and draw once; what cannot be read is said in the panel."""
        try:
            self._readings.append(read(*self._urls))
            self.error = ""
        except MetricsError as error:
            self.error = str(error)
        self.message.value = f'<div role="alert">{self.error}</div>' if self.error else ""
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=80)
        self.picture.value = picture.getvalue()

    def lines(self, title: str) -> dict[str, list[tuple[float, float]]]:
        """The points of a plot, by line: seconds since the first reading, and the value; NaN where nothing happened."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in PLOTS[title][1]}
        readings = list(self._readings)
        for number in range(1, len(readings)):
            step = readings[number] - readings[max(0, number - WINDOW)]
            for name, line in PLOTS[title][1].items():
                found[name].append((readings[number].seconds - readings[0].seconds, line(step)))
        return found

    def figure(self) -> Figure:
        """The four plots as they are now."""
        figure = Figure(figsize=(10, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, (unit, _)) in zip(figure.subplots(2, 2).flat, PLOTS.items(), strict=True):
            for name, points in self.lines(title).items():
                axes.plot(*zip(*points, strict=True) if points else ([], []), label=name, linewidth=1.2)
            axes.set(title=title, ylabel=unit, xlabel="seconds")
            if "ms" in unit:
                axes.set_yscale("log")
            elif unit == "0 to 1":
                axes.set_ylim(-0.03, 1.03)
            self._draw_marks(axes)
            axes.legend(fontsize="x-small", loc="upper left")
        return figure

    def _draw_marks(self, axes: Axes) -> None:
        for seconds, text in self._marks:
            place = seconds - self._readings[0].seconds
            if place >= 0:
                axes.axvline(place, color="gray", linestyle=":", linewidth=0.8)
                axes.annotate(text, (place, 1), xycoords=("data", "axes fraction"), fontsize=6, va="top", rotation=90)

    def _watch(self) -> None:
        while not self._end.is_set():
            self.look()
            self._end.wait(self._every)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**options)
        return bundle and {**bundle, "text/plain": self._text()}

    def _text(self) -> str:
        """The last point of each line."""
        rows = []
        for title, (unit, _) in PLOTS.items():
            last = {name: points[-1][1] for name, points in self.lines(title).items() if points}
            shown = ", ".join(f"{name} {value:.3g}" for name, value in last.items() if not math.isnan(value))
            rows.append(f"{title} ({unit}): {shown or 'nothing yet'}")
        return "\n".join(rows)
