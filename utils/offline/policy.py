"""When a tool is due, and with what: a fixed policy, one rule per kind of tool.

The extractive engine makes these calls as they are. A small language model rarely calls a tool of its own accord, so it
is asked for its calls when the policy finds them due, and writes their arguments itself (model.py).

Each rule with its tools and when a call is due:

    memory      update_user_memory, add_memory: the user states something about themselves that is not recorded yet
    history     get_chat_history, search_past_sessions: the request is about the conversation and the messages do not
                show it
    search      search_knowledge_base, search_*, retrieve_*, *_search: once a turn, before anything else is answered;
                several questions in one message are searched in parallel
    broadcast   delegate_task_to_members: once a turn
    delegate    delegate_task_to_member: route mode: the best fitting member; otherwise every member in turn, all at
                once if the user says "in parallel"
    tasks       create_task, execute_task, mark_all_complete: a task per member, each executed in turn, then the end
    left alone  think, update_memory, delete_memory, ...: only a reasoning model can use them well
    other       any other tool: once, if the request names what the tool does and holds every required argument

Rules are tried in this order and the first one with a due call wins. A forced tool (`tool_choice`) skips the question
whether it is due.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from utils.offline.conversation import SEARCH_TOOL, Conversation
from utils.offline.protocol import ApiError, ChatRequest, Function, NamedTool
from utils.offline.text import embed, stem, weighted_coverage, words_of

Arguments = dict[str, Any]
_MEMBER = re.compile(r'<member id="(?P<id>[^"]+)" name="(?P<name>[^"]*)"[^>]*>(?P<about>.*?)</member>', re.S)
_AT_ONCE = re.compile(r"\b(in parallel|at the same time|simultaneously|at once)\b", re.I)
_TASK_ID = re.compile(r"\bID: ([\w-]+)|\[([\w-]+)\]|task[_ ]id[\"': ]+([\w-]+)", re.I)


@dataclass(frozen=True)
class Decision:
    """A tool call to make: the tool's name and its arguments."""

    name: str
    arguments: Arguments


@dataclass(frozen=True)
class Rule:
    """When a kind of tool is due. `due` returns the arguments of each call to make now, none if it is not due.

    With `alternatives`, tools of this kind serve the same end, so that another one may be called in place of the first.
    With `verbatim`, the arguments are what the user said, and no model puts them in words of its own.
    """

    kind: str
    tools: re.Pattern[str]
    due: Callable[[Function, Conversation], list[Arguments]]
    alternatives: bool = False
    verbatim: bool = False


def decide(request: ChatRequest, conversation: Conversation) -> list[Decision]:
    """The tool calls to make next; empty when it is time to answer.

    Raises:
        ApiError: a forced tool has a required argument that the conversation does not hold.
    """
    tools = allowed_tools(request)
    calls = [choices[0] for choices in due_calls(request, conversation)]
    if not calls and tools and request.tool_choice not in (None, "auto"):
        calls = [_forced(tools, conversation)]
    return calls


def allowed_tools(request: ChatRequest) -> list[Function]:
    """The tools that may be called now: none, the one that `tool_choice` names, or all that are offered."""
    tools = [tool.function for tool in request.tools or []]
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        return [tool for tool in tools if tool.name == choice.function.name]
    return [] if choice == "none" else tools


def due_calls(request: ChatRequest, conversation: Conversation) -> list[tuple[Decision, ...]]:
    """The calls that are due now, each as its alternatives: a call by every tool that could make it, in their order."""
    for rule in RULES:
        due = (
            [Decision(tool.name, arguments) for arguments in rule.due(tool, conversation)]
            for tool in allowed_tools(request)
            if rule is _rule_of(tool)
        )
        first, *others = [calls for calls in due if calls] or [[]]
        if first:
            rows = zip_longest(first, *others if rule.alternatives else ())
            calls = [tuple(filter(None, row)) for row in rows][: len(first)]
            return calls if request.parallel_tool_calls else calls[:1]
    return []


def _rule_of(tool: Function) -> Rule:
    return next(rule for rule in RULES if rule.tools.search(tool.name))


def is_known(tool: Function) -> bool:
    """Whether a rule of its own says how the tool is called; of any other tool the policy knows the schema only."""
    return _rule_of(tool).kind != "other"


def is_verbatim(tool: Function) -> bool:
    """Whether the arguments of a due call are to be used as they are."""
    return _rule_of(tool).verbatim


def _forced(tools: Sequence[Function], conversation: Conversation) -> Decision:
    """The tool that fits the request best, its arguments filled as well as the request allows."""
    vectors = embed([conversation.request, *(f"{tool.name.replace('_', ' ')} {tool.description}" for tool in tools)])
    tool = tools[int((vectors[1:] @ vectors[0]).argmax())]
    arguments = fill_arguments(tool.parameters, conversation, guess=True)
    if arguments is None:
        raise ApiError(
            f"The offline engine finds no value in the messages for a required argument of '{tool.name}'.",
            param="tool_choice",
        )
    return Decision(tool.name, arguments)


def _times(conversation: Conversation, name: str) -> int:
    return sum(call.name == name for call in conversation.called)


def _memory(tool: Function, conversation: Conversation) -> list[Arguments]:
    facts = [fact for fact in conversation.user_facts if fact not in conversation.system]
    done = _times(conversation, tool.name)
    if tool.name == "update_user_memory":
        return [{"task": f"Remember: {' '.join(facts)}"}] if facts and not done else []
    return [{"memory": f"The user said: {fact}"} for fact in facts[done:]]


def _history(tool: Function, conversation: Conversation) -> list[Arguments]:
    shown = conversation.earlier_requests or conversation.known_about_user
    return [{}] if conversation.about_talk and not shown and not _times(conversation, tool.name) else []


def _search(tool: Function, conversation: Conversation) -> list[Arguments]:
    if conversation.about_talk or not words_of(conversation.question).words:
        return []
    text_arguments = [name for name in _required(tool) if _properties(tool)[name].get("type") == "string"]
    if not text_arguments:
        return []
    waiting = conversation.questions[_times(conversation, tool.name) :]  # one call at a time: the others come later
    return [{name: question for name in text_arguments} for question in waiting]


def members(conversation: Conversation) -> list[tuple[str, str]]:
    """(id, name with role and description) of each team member that the system message lists."""
    return [(m["id"], f"{m['name']} {' '.join(m['about'].split())}") for m in _MEMBER.finditer(conversation.system)]


def _broadcast(tool: Function, conversation: Conversation) -> list[Arguments]:
    return [] if _times(conversation, tool.name) else [{"task": conversation.request}]


def _delegate(tool: Function, conversation: Conversation) -> list[Arguments]:
    everyone = members(conversation)
    done = {call.arguments.get("member_id") for call in conversation.called if call.name == tool.name}
    if "You work in route mode" in conversation.system:
        if done or not everyone:
            return []
        return [{"member_id": _best_member(everyone, conversation), "task": conversation.request}]
    waiting = [{"member_id": member, "task": conversation.request} for member, _ in everyone if member not in done]
    return waiting if _AT_ONCE.search(conversation.request) else waiting[:1]


def _best_member(everyone: list[tuple[str, str]], conversation: Conversation) -> str:
    vectors = embed([conversation.request, *(about for _, about in everyone)])
    asked = words_of(conversation.request)
    fits = [
        float(vectors[i + 1] @ vectors[0]) + weighted_coverage(asked, words_of(about))
        for i, (_, about) in enumerate(everyone)
    ]
    return everyone[fits.index(max(fits))][0]


def _tasks(tool: Function, conversation: Conversation) -> list[Arguments]:
    everyone = members(conversation)
    created = [call for call in conversation.called if call.name == "create_task"]
    ids = [next(filter(None, match.groups())) for call in created if (match := _TASK_ID.search(call.result))]
    run = [call.arguments.get("task_id") for call in conversation.called if call.name == "execute_task"]
    if tool.name == "create_task" and not created:
        return [
            {"title": f"{member}: {conversation.request[:60]}", "description": conversation.request, "assignee": member}
            for member, _ in everyone
        ]
    if tool.name == "execute_task":
        return [
            {"task_id": task, "member_id": member}
            for task, (member, _) in zip(ids, everyone, strict=False)
            if task not in run
        ][:1]
    if tool.name == "mark_all_complete" and run and not _times(conversation, tool.name):
        return [{"summary": f"{len(run)} of {len(created)} tasks executed."}]
    return []


def _never(tool: Function, conversation: Conversation) -> list[Arguments]:
    return []


def _other(tool: Function, conversation: Conversation) -> list[Arguments]:
    if _times(conversation, tool.name):
        return []
    # "Names what the tool does": at least half of the words of the tool's name appear in the request, by stem.
    name = {stem(part) for part in re.split(r"[_.-]", tool.name) if part}
    said = words_of(conversation.request).stems | {stem(word) for word in re.findall(r"\w+", conversation.request)}
    if 2 * len(name & said) < len(name):
        return []
    arguments = fill_arguments(tool.parameters, conversation, guess=False)
    return [] if arguments is None else [arguments]


RULES: tuple[Rule, ...] = (
    Rule("memory", re.compile(r"^(update_user_memory|add_memory)$"), _memory, verbatim=True),
    Rule("history", re.compile(r"^(get_chat_history|search_past_sessions)$"), _history),
    Rule("search", SEARCH_TOOL, _search, alternatives=True),
    Rule("broadcast", re.compile(r"^delegate_task_to_members$"), _broadcast),
    Rule("delegate", re.compile(r"^delegate_task_to_member$"), _delegate),
    Rule("tasks", re.compile(r"^(create_task|execute_task|mark_all_complete)$"), _tasks),
    # Tools of Agno that only a reasoning model can use well: never called unless forced.
    Rule(
        "left alone",
        re.compile(
            r"^(think|analyze|update_memory|delete_memory|clear_memory|add_to_knowledge|get_tool_call_history|read_past_session"
            r"|update_session_state|execute_tasks_parallel|update_task_status|list_tasks|add_task_note|get_member_information)$"
        ),
        _never,
    ),
    Rule("other", re.compile(r""), _other, alternatives=True),
)


def _properties(tool: Function) -> dict[str, dict[str, Any]]:
    return {
        name: value if isinstance(value, dict) else {} for name, value in tool.parameters.get("properties", {}).items()
    }


def _required(tool: Function) -> list[str]:
    return [name for name in tool.parameters.get("required", []) if name in _properties(tool)]


def fill_arguments(parameters: dict[str, Any], conversation: Conversation, guess: bool) -> Arguments | None:
    """Values for the required parameters, taken from the request's words; None when one is not there.

    A choice (enum) must be named, a number must stand in the text, a text is what the request quotes or a proper name,
    and for parameters such as `query`, `question`, `text` or `task` the whole request. With `guess` a text falls back
    to the whole request, a choice to its first value, a number to 0 and a truth value to true.
    """
    text = conversation.request
    figures = re.findall(r"(?<![\w.])-?\d{1,15}(?:\.\d{1,15})?(?![\w.]*\w)", text)
    numbers = [float(n) if "." in n else int(n) for n in figures]
    quoted = re.findall(r"[\"“']([^\"”']+)[\"”']", text)
    names = re.findall(r"(?<!^)(?<![.?!] )\b([A-Z][\w-]*(?: [A-Z][\w-]*)*)", text)
    texts = [*quoted, *names]
    properties = parameters.get("properties", {})
    filled: Arguments = {}
    for name in parameters.get("required", []):
        wanted = properties.get(name) if isinstance(properties.get(name), dict) else {}
        kind = wanted.get("type")
        value: Any = None
        if "enum" in wanted:
            said = [choice for choice in wanted["enum"] if str(choice).lower() in text.lower()]
            value = said[0] if said else wanted["enum"][0] if guess and wanted["enum"] else None
        elif kind in ("integer", "number"):
            fitting = [n for n in numbers if kind == "number" or isinstance(n, int)]
            value = fitting[0] if fitting else 0 if guess else None
            if fitting:
                numbers.remove(fitting[0])
        elif kind == "boolean":
            value = True if guess else None
        elif kind == "array":
            value = [] if guess else None
        elif kind == "object":
            value = fill_arguments(wanted, conversation, guess) if guess else None
        elif re.search(r"query|question|text|task|message|input|prompt|content|expression", name):
            value = text or None
        else:
            value = texts.pop(0) if texts else text if guess else None
        if value is None:
            return None
        filled[name] = value
    return filled
