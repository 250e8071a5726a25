"""What a language model may write: grammars and JSON schemas that llama.cpp holds it to.

llama.cpp is built with llguidance, which turns a JSON schema into a grammar. It ignores a schema of which it can build
none, and a bound of a trillion takes all memory, so schemas are bounded here, and what was written is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jsonschema_rs import Draft202012Validator

from utils.offline.policy import Decision, is_known, is_verbatim
from utils.offline.protocol import ApiError, ChatRequest, Function

Json = dict[str, Any]
# For texts and lists of a schema that sets them no end: a small model may repeat itself for ever, and half of a JSON
# value is of no use.
MAX_CHARACTERS = {"tools": 500, "response_format": 1000}
MAX_ITEMS = 20
MAX_BOUND = 2000
_LOWER_BOUNDS, _UPPER_BOUNDS = {"minLength", "minItems", "minProperties"}, {"maxLength", "maxItems", "maxProperties"}
# Which member, which task: the policy knows it from the conversation, and a small model makes names up. Agno takes two
# tasks of one title for the same.
_IDENTIFIER = re.compile(r"_id$|^(assignee|title)$")
# Blanks and line breaks between the parts of a JSON value are tokens that take time. Lenient: what a grammar cannot
# express (uniqueItems, oneOf as different from anyOf, unknown formats) is left to the check of the whole text.
_GUIDANCE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}


def answer_grammar(sources: list[str]) -> str:
    """A grammar for the answer to what tools returned: it begins with a word, and cites no document but these.

    A small model likes to go on with what it has just read (documents, JSON), to cite the example of its instructions,
    and to put a document's id where the fact should stand. So square brackets are for code (`meta["k"]`, `in ["a"]`)
    and, behind the end of a sentence, for ids of what was found.
    """
    code = r"""(in |[=(,:] ?|[A-Za-z0-9_)\]])\[[-0-9:"']"""
    ids = "|".join(re.escape(source).replace("/", r"\/") for source in sources)
    cited = rf"|[.!?:)`*|\n]([, ]*\[({ids})\])+" if ids else ""
    return f"%llguidance {{}}\nstart: /[^\\[{{<]([^\\[]|{code}{cited})*/"


def json_grammar(schema: Json, where: str) -> str:
    """The schema as a grammar that lets no other text pass, with an end for every text and list in it.

    Args:
        schema: a JSON schema, within bounds.
        where: "tools" or "response_format", which sets how long texts may be.
    """
    ended = _ended(schema, where)
    return f"%llguidance {{}}\nstart: %json {json.dumps({**ended, 'x-guidance': _GUIDANCE})}"


def is_valid(text: str, validator: Draft202012Validator) -> bool:
    """Whether the text is JSON that follows the schema of the validator."""
    try:
        return bool(validator.is_valid(json.loads(text)))
    except ValueError:
        return False


def call_schema(tools: dict[str, Function], arguments: dict[str, Json]) -> Json:
    """The schema of one call of one of the tools, given for each the schema of its arguments (see arguments_schema)."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in arguments.items()
    ]
    return {"anyOf": calls, "$defs": {name: _moved(tools[name].parameters, f"/$defs/{name}") for name in arguments}}


def arguments_schema(tool: Function, call: Decision) -> Json:
    """The tool's parameters as far as the model is to write them; what the policy alone knows is fixed."""
    properties = tool.parameters.get("properties", {})
    moved = _moved(properties, f"/$defs/{tool.name}")
    required = tool.parameters.get("required", [])
    written = [name for name in properties if name in call.arguments or name in required or not is_known(tool)]
    as_it_is = is_verbatim(tool)
    fixed = {name: {"const": value} for name, value in call.arguments.items() if as_it_is or _IDENTIFIER.search(name)}
    return {
        "type": "object",
        "properties": {name: fixed.get(name) or moved.get(name, {}) for name in written},
        "required": [name for name in written if name in call.arguments or name in required],
        "additionalProperties": False,
    }


def within_bounds(request: ChatRequest) -> ChatRequest:
    """The request with schemas that ask for no more than a reply can hold: a grammar for more takes all memory.

    Raises:
        ApiError: a schema does not allow less.
    """
    made = request.model_copy(deep=True)
    for tool in made.tools or []:
        tool.function.parameters = _lowered(tool.function.parameters, "tools")
    if made.response_format is not None and (wanted := made.response_format.json_schema) is not None:
        wanted.schema_ = _lowered(wanted.schema_, "response_format")
    return made


def _changed(schema: Any, change: Callable[[Json], Json]) -> Any:
    """The schema with a change made to each object in it, the innermost first."""
    if isinstance(schema, list):
        return [_changed(part, change) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return change({name: _changed(value, change) for name, value in schema.items()})


def _moved(schema: Json, place: str) -> Any:
    """The schema with its references as they must be when it stands at `place` within another one."""

    def move(part: Json) -> Json:
        own = part.get("$ref")
        return part | ({"$ref": f"#{place}{own[1:]}"} if isinstance(own, str) and own.startswith("#") else {})

    return _changed(schema, move)


def _lowered(schema: Json, where: str) -> Any:
    """The schema with no bound above MAX_BOUND."""

    def lower(part: Json) -> Json:
        for name in _LOWER_BOUNDS | _UPPER_BOUNDS:
            value = part.get(name)
            if isinstance(value, int | float) and value > MAX_BOUND:
                if name in _LOWER_BOUNDS:
                    raise ApiError(
                        f"Invalid schema in '{where}': {name} is {value}, and this model allows up to {MAX_BOUND}.",
                        param=where,
                    )
                part[name] = MAX_BOUND
        return part

    return _changed(schema, lower)


def _ended(schema: Json, where: str) -> Any:
    """The schema with an end for every text and list in it."""

    def end(part: Json) -> Json:
        kinds = part.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "string" in kinds and not part.keys() & {"enum", "const", "pattern", "format", "maxLength"}:
            part["maxLength"] = max(MAX_CHARACTERS[where], part.get("minLength", 0))
        if "array" in kinds and not part.keys() & {"enum", "const", "maxItems"}:
            part["maxItems"] = max(MAX_ITEMS, part.get("minItems", 0), len(part.get("prefixItems", ())))
        return part

    return _changed(schema, end)
