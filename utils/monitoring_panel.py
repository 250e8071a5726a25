"""A live panel of a service and its Milvus: reads their metrics every second and draws what happened in each."""

from __future__ import annotations

import io
import math
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as ipw
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.prometheus import MetricsError, Reading, read

WINDOW = 3.0  # seconds that one point of a line is made of, so that a line is no noise
STAGES = ("embedding", "vector_search", "context_assembly", "model_first_token", "model_rest")
OUTCOMES = ("completed", "failed", "refused", "aborted")
Line = Callable[[Reading], float]


def _per_second(name: str, **labels: str) -> Line:
    return lambda step: step.total(name, **labels) / step.seconds


def _mean_ms(name: str, unit_ms: float, **labels: str) -> Line:
    return lambda step: unit_ms * step.mean(name, **labels)


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
            "refused to answer": lambda step: (
                step.total("agent_refusals_total") / (step.total("agent_runs_total", outcome="completed") or math.nan)
            ),
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
        self._readings: deque[Reading] = deque()  # of the last WINDOW seconds
        self._points: deque[tuple[float, dict[str, float]]] = deque(maxlen=math.ceil(60 * minutes / every))
        self._begun = time.monotonic()
        self._marks: list[tuple[float, str]] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.error = ""
        self.picture = ipw.Image(format="png", layout=ipw.Layout(max_width="100%"))
        self.message, self.figures = ipw.HTML(), ipw.HTML()
        self.view = ipw.VBox([self.message, self.picture, self.figures])
        self.view.add_class("monitoring-panel")

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
        """Draw a dotted line at this moment, with a short text."""
        self._marks.append((time.monotonic() - self._begun, text))

    def look(self) -> None:
        """Read and draw once; what cannot be read is said in the panel."""
        try:
            self._take(read(*self._urls))
            self.error = ""
        except MetricsError as error:
            self.error = str(error)
        self.message.value = f'<div role="alert">{escape(self.error)}</div>' if self.error else ""
        self.figures.value = f"<pre>{escape(self._text())}</pre>"  # the picture in words
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=80)
        self.picture.value = picture.getvalue()

    def _take(self, now: Reading) -> None:
        if self._readings:
            while len(self._readings) > 1 and now.seconds - self._readings[1].seconds >= WINDOW:
                self._readings.popleft()
            step = now - self._readings[0]
            values = {name: line(step) for _, lines in PLOTS.values() for name, line in lines.items()}
            self._points.append((now.seconds - self._begun, values))
        self._readings.append(now)

    def lines(self, title: str) -> dict[str, list[tuple[float, float]]]:
        """The points of a plot, by line: seconds since the panel was made, and value; NaN where nothing happened."""
        points = list(self._points)
        return {name: [(seconds, values[name]) for seconds, values in points] for name in PLOTS[title][1]}

    def figure(self) -> Figure:
        """The four plots as they are now."""
        figure = Figure(figsize=(10, 5.6))
        figure.subplots_adjust(0.07, 0.09, 0.98, 0.93, wspace=0.18, hspace=0.42)
        for axes, (title, (unit, _)) in zip(figure.subplots(2, 2).flat, PLOTS.items(), strict=True):
            for name, points in self.lines(title).items():
                axes.plot(*zip(*points, strict=True) if points else ([], []), label=name, linewidth=1.2)
            axes.set_title(title, pad=12)
            axes.set(ylabel=unit, xlabel="seconds")
            if "ms" in unit:
                axes.set_yscale("log")
                # Powers of ten would be drawn as formulas, and matplotlib's parser of these is not made for threads.
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            elif unit == "0 to 1":
                axes.set_ylim(-0.03, 1.03)
            self._draw_marks(axes)
            axes.legend(fontsize="x-small", loc="best")
        return figure

    def _draw_marks(self, axes: Axes) -> None:
        oldest = self._points[0][0] if self._points else 0.0
        for place, text in self._marks:
            if place >= oldest:
                axes.axvline(place, color="gray", linestyle=":", linewidth=0.8)
                axes.annotate(text, (place, 1.01), xycoords=("data", "axes fraction"), fontsize=7, ha="center")

    def _watch(self) -> None:
        while not self._end.is_set():
            self.look()
            self._end.wait(self._every)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**options)
        return bundle and {**bundle, "text/plain": self._text()}

    def _text(self) -> str:
        """The last point of each line."""
        rows, last = [], self._points[-1][1] if self._points else {}
        for title, (unit, lines) in PLOTS.items():
            values = {name: last.get(name, math.nan) for name in lines}
            shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if not math.isnan(value))
            rows.append(textwrap.fill(f"{title} ({unit}): {shown or 'nothing yet'}", 100, subsequent_indent="    "))
        return "\n".join(rows)
