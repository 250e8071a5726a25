"""What the console (utils/widgets.py) shows, as HTML.

What the service or the user wrote is shown as text or as Markdown without HTML and pictures: a document may hold a
script, or a picture whose address tells others what you ask.
"""

from __future__ import annotations

from html import escape
from typing import Any

from markdown_it import MarkdownIt

from utils.service_client import Json, Run

STYLE = """<style>
.knowledge-console { max-width: 100%; font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1); }
.knowledge-console .widget-html-content { line-height: 1.5; overflow-wrap: anywhere; }
.knowledge-console .console-log { flex-direction: column-reverse; max-height: 420px; overflow-y: auto;
  margin-bottom: 8px; }
.knowledge-console .console-log > * { flex: none; }
.knowledge-console :is(input, select, textarea) { font-family: inherit; min-width: 0; }
.knowledge-console .cc-question { width: fit-content; max-width: 80%; margin: 10px 0 6px auto; padding: 6px 12px;
  border-radius: 12px 12px 2px 12px; white-space: pre-wrap; background: var(--jp-layout-color2); }
.knowledge-console .cc-text { max-width: 92%; font-size: var(--jp-content-font-size1, 14px); }
.knowledge-console .cc-text p { margin: 4px 0; }
.knowledge-console .cc-text a, .knowledge-console .cc-cited { color: var(--jp-content-link-color); }
.knowledge-console .cc-muted, .knowledge-console .console-status { color: var(--jp-ui-font-color2); }
.knowledge-console .cc-chip { display: inline-block; margin: 2px 4px 2px 0; padding: 0 9px; border-radius: 10px;
  border: 1px solid var(--jp-border-color1); font-size: 12px; }
.knowledge-console .cc-cited { border-color: currentColor; }
.knowledge-console .cc-error { padding: 6px 10px; border-left: 4px solid var(--jp-error-color1); white-space: pre-wrap;
  background: var(--jp-layout-color2); }
.knowledge-console .cc-failed, .knowledge-console .cc-partial { color: var(--jp-error-color1); }
.knowledge-console .cc-completed { color: var(--jp-success-color1); }
.knowledge-console .console-row { border-bottom: 1px solid var(--jp-border-color2); justify-content: space-between;
  align-items: center; padding: 0 4px; }
.knowledge-console .cc-line { display: grid; grid-template-columns: minmax(90px, 210px) 1fr 70px; gap: 10px;
  height: 24px; align-items: center; white-space: nowrap; }
.knowledge-console .cc-line span { overflow: hidden; text-overflow: ellipsis; }
.knowledge-console .cc-line span:last-child { text-align: right; }
.knowledge-console .cc-track { position: relative; height: 100%; border-left: 1px solid var(--jp-border-color1); }
.knowledge-console .cc-axis { display: flex; justify-content: space-between; color: var(--jp-ui-font-color2);
  border-top: 1px solid var(--jp-border-color1); }
.knowledge-console .cc-track i { position: absolute; top: 5px; bottom: 5px; min-width: 2px; border-radius: 2px; }
.knowledge-console .cc-wait { background: var(--jp-ui-font-color3); }
.knowledge-console .cc-step { background: var(--jp-border-color1); }
.knowledge-console .cc-model { background: var(--jp-brand-color1); }
.knowledge-console .cc-tool { background: var(--jp-warn-color1); }
.knowledge-console .cc-answer { background: var(--jp-success-color1); }
.knowledge-console table { border-collapse: collapse; margin-top: 12px; }
.knowledge-console td { padding: 3px 24px 3px 0; border-bottom: 1px solid var(--jp-border-color2); }
</style>"""

_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def _open_link(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrs |= {"target": "_blank", "rel": "noopener noreferrer"}  # not in place of JupyterLab
    return str(renderer.renderToken(tokens, index, options, env))


_markdown.add_render_rule("link_open", _open_link)


def question_html(question: str) -> str:
    """What the user asked."""
    return f'<div class="cc-question">{escape(question)}</div>'


def answer_html(text: str, status: str) -> str:
    """An answer's Markdown as HTML that holds nothing but text, lists, tables, code and links."""
    note = "" if status in ("running", "completed") else f'<div class="cc-muted">({escape(status)})</div>'
    return f'<div class="cc-text">{_markdown.render(text)}{note}</div>'


def sources_html(names: list[str], text: str) -> str:
    """The documents that were found; those that the answer names come first and stand out."""
    cited = [name for name in names if f"[{name}]" in text]
    others = [name for name in names if name not in cited]
    chips = [f'<span class="cc-chip cc-cited">{escape(name)}</span>' for name in cited]
    if cited and others:
        chips.append('<span class="cc-muted">also found</span> ')
    chips += [f'<span class="cc-chip cc-muted">{escape(name)}</span>' for name in others]
    return f'<span class="cc-muted">Sources</span> {"".join(chips)}' if chips else ""


def document_html(document: Json) -> str:
    """A line of the list of documents."""
    name, status = escape(document.get("name") or document["id"]), escape(document["status"])
    why, size = escape(document.get("status_message") or ""), int(document.get("size") or 0)
    return f'<b>{name}</b> <span class="cc-muted">{size:,} bytes</span> <span class="cc-{status}">{status}</span> {why}'


def timeline_html(run: Run) -> str:
    """A run as bars over time, as this computer saw it, and a table of its figures."""
    bars = [("first event", "wait", 0.0, run.first_event)]
    bars += [(span.label, span.kind, span.start, span.end) for span in run.spans]
    if run.first_token is not None:
        bars.append(("answer is visible", "answer", run.first_token, run.seconds))
    lines, whole = [], max(run.seconds, 1e-6)
    for label, kind, start, end in bars:
        left, width = 100 * start / whole, 100 * ((run.seconds if end is None else end) - start) / whole
        lines.append(
            f'<div class="cc-line" title="from {_ms(start)}"><span>{escape(label)}</span><div class="cc-track">'
            f'<i class="cc-{kind}" style="left:{left:.2f}%;width:{width:.2f}%"></i></div>'
            f"<span>{'not ended' if end is None else _ms(end - start)}</span></div>"
        )
    figures = {
        "Question": run.question,
        "Run": f"{run.status} in {_ms(run.seconds)}",
        "First visible text": _ms(run.first_token),
        "<code>time_to_first_token</code>": f"{_ms(run.reported)} (the model's first reply, also if it is a tool call)",
        "Tokens": f"{run.input_tokens} in, {run.output_tokens} out",
        "Tools": ", ".join(span.label for span in run.spans if span.kind == "tool") or "none",
    }
    rows = "".join(f"<tr><td>{name}</td><td>{escape(value)}</td></tr>" for name, value in figures.items())
    axis = f'<div class="cc-axis"><span>0 ms</span><span>{_ms(run.seconds)}</span></div>'
    lines.append(f'<div class="cc-line"><span></span>{axis}<span></span></div>')
    return f"<div>{''.join(lines)}</div><table>{rows}</table>"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.0f} ms"
