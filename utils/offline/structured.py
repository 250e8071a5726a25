"""JSON answers: fill a schema from what was found.

A field is filled by its type and name: `sources` gets document ids, `score` the confidence on the field's scale,
`reason` and `answer` the quotes, any other text the sentence that fits the question together with the field's name and
description, and a number the first number of that sentence. The result is validated; a schema that cannot be met is an
error, not a wrong answer.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from utils.offline.answers import Passage, find_answer
from utils.offline.protocol import ApiError, schema_validator
from utils.offline.text import split_sentences

_MAX_DEPTH = 12
# Longer texts and lists are not made up to reach a minLength or minItems.
_MAX_PADDING = 10_000
_SOURCES = re.compile(r"source|citation|reference|document", re.I)
_SCORE = re.compile(r"score|rating|confidence|probability|relevance", re.I)
_WHOLE = re.compile(r"answer|summary|reason|explanation|content|text|response|report|rationale|message|result", re.I)
_TITLE = re.compile(r"title|headline|subject", re.I)
_ASKED = re.compile(r"question|query|request", re.I)
_TOPICS = re.compile(r"topic|tag|keyword", re.I)


@dataclass(frozen=True)
class Findings:
    """What there is to fill a schema with."""

    question: str
    text: str
    sources: tuple[str, ...]
    answered: bool
    confidence: float
    passages: tuple[Passage, ...]


def fill_schema(schema: dict[str, Any], findings: Findings) -> str:
    """A JSON text that is valid under `schema`.

    Raises:
        ApiError: the engine cannot meet the schema (a `pattern`, for instance).
    """
    value = _fill(schema, schema, "", findings, 0)
    try:
        schema_validator(schema, "response_format").validate(value)
    except jsonschema_rs.ValidationError as error:
        raise ApiError(
            f"The offline engine cannot fill this schema: {error.message[:200]}",
            param="response_format",
            code="unsupported_schema",
        ) from None
    return json.dumps(value, ensure_ascii=False)


def _resolve(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    for _ in range(_MAX_DEPTH):
        if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
            break
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target.get(part) if isinstance(target, dict) and part else target
        schema = target
    return schema if isinstance(schema, dict) else {}


def _fill(schema: Any, root: dict[str, Any], name: str, found: Findings, depth: int) -> Any:
    schema = _resolve(schema, root)
    if depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return _choose(schema["enum"], found)
    if "default" in schema and not found.answered:
        return schema["default"]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            options = [_resolve(option, root) for option in schema[key]]
            real = [option for option in options if option.get("type") != "null"]
            # A schema that contains itself ends where it may.
            ends = not real or (len(real) < len(options) and depth >= 6)
            return None if ends else _fill(real[0], root, name, found, depth + 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {}
        for part in (_resolve(part, root) for part in schema["allOf"]):
            merged = {**merged, **part, "properties": {**merged.get("properties", {}), **part.get("properties", {})}}
        return _fill(merged, root, name, found, depth + 1)
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    kind = next((k for k in kinds if k != "null"), "null") if isinstance(kinds, list) else kinds
    match kind:
        case "object":
            properties = schema.get("properties", {})
            required = schema.get("required", [])
            # A schema that contains itself ends where its optional fields begin to repeat.
            wanted = [p for p in properties if p in required or depth < 4] + [
                p for p in required if p not in properties
            ]
            return {p: _fill(properties.get(p, {}), root, p, found, depth + 1) for p in wanted}
        case "array":
            return _fill_array(schema, root, name, found, depth)
        case "boolean":
            return found.answered
        case "integer" | "number":
            return _number(schema, kind, name, found)
        case "null":
            return None
        case _:
            return _text(schema, name, found)


def _fill_array(schema: dict[str, Any], root: dict[str, Any], name: str, found: Findings, depth: int) -> list[Any]:
    item = _resolve(schema.get("items", {}), root)
    least, most = schema.get("minItems", 0), schema.get("maxItems", 8)
    values: list[Any]
    if item.get("type") == "string" and "enum" not in item:
        if _SOURCES.search(name):
            values = list(found.sources)
        elif _TOPICS.search(name):
            values = [source.replace("-", " ") for source in found.sources]
        else:
            values = (
                [re.sub(r"\s*\[[\w.-]+\]$", "", line) for line in found.text.split("\n\n")] if found.answered else []
            )
        values = [_fit(item, value) for value in values]
    else:
        values = [_fill(item, root, name, found, depth + 1)] if found.answered and depth < 6 else []
    while len(values) < min(least, _MAX_PADDING):
        values.append(values[-1] if values else _fill(item, root, name, found, depth + 1))
    return values[: int(most)]


def _choose(options: list[Any], found: Findings) -> Any:
    texts = [option for option in options if isinstance(option, str)]
    said = [option for option in texts if option.lower() in found.text.lower()]
    return said[0] if said else options[0] if found.answered else options[-1]


def _best_sentence(schema: dict[str, Any], name: str, found: Findings) -> str:
    about = f"{found.question} {name.replace('_', ' ')} {schema.get('description', '')}"
    quotes = find_answer(about, found.passages, max_sentences=1).quotes
    return quotes[0].text if quotes and found.answered else ""


def _number(schema: dict[str, Any], kind: str, name: str, found: Findings) -> int | float:
    low, high = schema.get("minimum"), schema.get("maximum")
    if _SCORE.search(name):
        low = 0 if low is None else low
        high = (1 if kind == "number" else 10) if high is None else high
        value = low + found.confidence * (high - low)
    else:
        digits = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?", _best_sentence(schema, name, found))
        value = float(digits[0].replace(",", "")) if digits else 0.0
        value = value if math.isfinite(value) else 0.0
    step = 1 if kind == "integer" else 0.001
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + step
    if "exclusiveMaximum" in schema:
        high = schema["exclusiveMaximum"] - step
    value = value if low is None else max(low, value)
    value = value if high is None else min(high, value)
    return round(value) if kind == "integer" else round(value, 3)


def _text(schema: dict[str, Any], name: str, found: Findings) -> str:
    if _SOURCES.search(name):
        value = ", ".join(found.sources)
    elif _TITLE.search(name):
        value = (split_sentences(found.question) or [""])[0].rstrip("?.!")
    elif _ASKED.search(name):
        value = found.question
    elif _WHOLE.search(name) or not found.answered:
        value = found.text
    else:
        value = _best_sentence(schema, name, found) or found.text
    return _fit(schema, value)


def _fit(schema: dict[str, Any], value: str) -> str:
    """`value` cut or padded to the length that `schema` asks for."""
    value = value[: int(schema["maxLength"])] if "maxLength" in schema else value
    return value.ljust(min(int(schema.get("minLength", 0)), _MAX_PADDING), ".")
