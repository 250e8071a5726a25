"""Messages and tools in the form that OpenAI's API has, for the tests of the offline server."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings

# The same examples in every run: a learner's red test is the learner's doing.
modest = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
Json = dict[str, Any]

PORTS: Json = {
    "name": "milvus-ports",
    "meta_data": {"id": "milvus-ports", "topic": "deployment"},
    "content": "# Ports\n\nMilvus listens for clients on port 19530. Its metrics and health checks are on port 9091."
    "\n\nThe web interface needs no account.",
}
BACKUP: Json = {
    "name": "milvus-backup",
    "meta_data": {"id": "milvus-backup"},
    "content": "# Backup\n\nThe tool `milvus-backup` copies a collection to object storage. A restore writes the "
    "collection under a new name with the suffix `_recovered`.",
}
BOTH = [PORTS, BACKUP]
PORT_QUESTION = "Which port does Milvus listen on for clients?"
BACKUP_QUESTION = "Which tool copies a collection to object storage?"
# What no document above answers.
OTHER_QUESTION = "How do I bake sourdough bread without yeast?"


def user(text: Any) -> Json:
    return {"role": "user", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def called(name: str, arguments: Json | str, result: str, number: int = 0) -> list[Json]:
    """An assistant message with one call, and its result."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"id": f"call_{name}_{number}", "type": "function", "function": {"name": name, "arguments": text}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": result},
    ]


def searched(question: str, documents: Any, query: str | None = None) -> list[Json]:
    """A conversation in which the knowledge base was searched; documents may be the tool's text as it is."""
    result = documents if isinstance(documents, str) else json.dumps(documents, ensure_ascii=False)
    return [user(question), *called("search_knowledge_base", {"query": query or question}, result)]


def tool(name: str, description: str = "", /, **parameters: Any) -> Json:
    """A tool whose parameters are all required; a parameter is a JSON type or a schema."""
    properties = {key: {"type": kind} if isinstance(kind, str) else kind for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


SEARCH = tool("search_knowledge_base", "Search the knowledge base.", query="string")


def json_schema(schema: Json, strict: bool | None = None) -> Json:
    """A response_format."""
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": strict}}
