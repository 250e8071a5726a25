"""The capacity sheet as a panel of ipywidgets: change an input, and see what each layer needs and costs, and why."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from html import escape
from typing import Any

import ipywidgets as ipw

from utils.capacity import INDEXES, CapacityError, Formula, Load, Plan, plan

GROUPS = {
    "traffic": "Traffic",
    "knowledge": "Knowledge",
    "measured": "Measured",
    "machines": "Machines",
    "prices": "Prices",
}
LAYERS = {
    "agents": "AgentOS: {agent_replicas:,.0f} replicas, {runs_in_flight:,.1f} runs in flight",
    "sessions": "PostgreSQL: {connections:,.0f} connections, {sessions_gib:,.0f} GiB",
    "retrieval": "Milvus: {query_nodes:,.0f} query nodes, {memory_gib:,.2f} GiB in memory per copy",
    "model": "Model: {model_seconds:,.1f} s per request",
}
STYLE = """<style>
.capacity-panel { max-width: 100%; }
.capacity-panel .widget-html-content { line-height: 1.5; overflow-wrap: anywhere; }
.capacity-panel .cp-row { border-bottom: 1px solid var(--jp-border-color2); align-items: center; }
.capacity-panel .cp-muted { color: var(--jp-ui-font-color2); }
.capacity-panel .cp-error { padding: 6px 10px; border-left: 4px solid var(--jp-error-color1); }
.capacity-panel table { border-collapse: collapse; width: 100%; }
.capacity-panel :is(td, th) { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--jp-border-color2);
  text-align: left; vertical-align: top; }
.capacity-panel .cp-name { white-space: nowrap; }
.capacity-panel .cp-number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.capacity-panel .cp-bar { height: 10px; min-width: 2px; margin-top: 4px; background: var(--jp-brand-color1); }
.capacity-panel code { white-space: normal; }
</style>"""


class CapacityPanel:
    """The panel; a cell that ends with it shows it, and as text the plan of the moment.

    Args:
        load: what the inputs begin with.

    Attributes:
        inputs: the widgets by the names of `Load`.
        plan: the plan for the inputs; the last one that could be made while an input is out of range.
    """

    def __init__(self, load: Load | None = None) -> None:
        self.plan: Plan = plan(load or Load())
        self.inputs = {one.name: _input(one, getattr(self.plan.load, one.name)) for one in fields(Load)}
        self.result = ipw.HTML()
        pages = [
            ipw.VBox([_row(one, self.inputs[one.name]) for one in fields(Load) if one.metadata["group"] == group])
            for group in GROUPS
        ]
        self.view = ipw.VBox([ipw.HTML(STYLE), ipw.Tab(pages, titles=[*GROUPS.values()]), self.result])
        self.view.add_class("capacity-panel")
        for widget in self.inputs.values():
            widget.observe(self._calculate, "value")
        self._calculate()

    def set(self, **values: float | str) -> Plan:
        """Set inputs by the names of `Load`, as if typed, and return the plan.

        Raises:
            CapacityError: a value is out of range; then nothing changes.
        """
        wanted = plan(Load(**(self._values() | values)))
        for name, value in values.items():
            self.inputs[name].value = value
        return wanted

    def _values(self) -> dict[str, Any]:
        return {name: widget.value for name, widget in self.inputs.items()}

    def _calculate(self, _: object = None) -> None:
        try:
            self.plan = plan(Load(**self._values()))
        except CapacityError as error:
            self.result.value = f'<div class="cp-error" role="alert">{escape(str(error))}</div>'
            return
        self.result.value = result_html(self.plan)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.view._repr_mimebundle_(**options)
        return bundle and {**bundle, "text/plain": result_text(self.plan)}


def result_text(made: Plan) -> str:
    """What each layer needs and costs, one line each."""
    known = {formula.name: value for formula, value in made.lines}
    lines = [f"{LAYERS[layer].format(**known):64} {cost:10,.0f} USD a month" for layer, cost in made.costs().items()]
    lines.append(f"{'Together':64} {known['total_usd']:10,.0f} USD a month")
    return "\n".join(lines + [textwrap.fill(warning, 100) for warning in made.warnings()])


def result_html(made: Plan) -> str:
    """The same with bars, and below it every line of the sheet with its formula and source."""
    known = {formula.name: value for formula, value in made.lines}
    whole = known["total_usd"] or 1
    rows = "".join(
        f"<tr><td>{escape(LAYERS[layer].format(**known))}</td><td class='cp-number'>{cost:,.0f} USD</td>"
        f"<td style='width: 40%'><div class='cp-bar' style='width: {100 * cost / whole:.1f}%'></div></td></tr>"
        for layer, cost in made.costs().items()
    )
    total = f"<tr><th>A month of all layers</th><th class='cp-number'>{known['total_usd']:,.0f} USD</th><th></th></tr>"
    notes = "".join(f"<p>{escape(warning)}</p>" for warning in made.warnings())
    sheet = "".join(_line_html(formula, value) for formula, value in made.lines)
    heads = "".join(f"<th>{head}</th>" for head in ("quantity", "value", "formula", "source"))
    return (
        f"<table>{rows}{total}</table>{notes}<details><summary>Every formula with its source</summary>"
        f"<table><tr>{heads}</tr>{sheet}</table></details>"
    )


def _line_html(formula: Formula, value: float) -> str:
    number = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return (
        f"<tr><td class='cp-name'>{escape(formula.name)}</td>"
        f"<td class='cp-number'>{number}<br><span class='cp-muted'>{escape(formula.unit)}</span></td>"
        f"<td><code>{escape(formula.text)}</code></td><td class='cp-muted'>{escape(formula.source)}</td></tr>"
    )


def _input(one: Field[Any], value: Any) -> Any:
    label = f"{one.name}, {one.metadata['unit']}".removesuffix(", ")
    layout = ipw.Layout(width="130px", flex="0 0 auto")
    if one.name == "index":
        return ipw.Dropdown(options=[*INDEXES], value=value, tooltip=label, layout=layout)
    assert one.default is not MISSING
    return ipw.FloatText(value=value, tooltip=label, layout=layout, continuous_update=False)


def _row(one: Field[Any], widget: Any) -> ipw.HBox:
    name = ipw.HTML(f"<b>{escape(one.name)}</b>", layout=ipw.Layout(width="180px", flex="0 0 auto"))
    about = [text for text in (one.metadata["unit"], one.metadata["source"]) if text]
    note = ipw.HTML(f'<span class="cp-muted">{escape("; ".join(about))}</span>', layout=ipw.Layout(flex="1 1 auto"))
    row = ipw.HBox([name, widget, note])
    row.add_class("cp-row")
    return row
