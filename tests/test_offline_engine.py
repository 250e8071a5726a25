"""The offline engine without its server: what it answers, when it declines, and which tool calls its policy makes."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from agno.agent import Agent
from agno.session import TeamSession
from agno.team import Team
from agno.team.mode import TeamMode
from hypothesis import given
from hypothesis import strategies as st
from offline_messages import (
    BACKUP_QUESTION,
    BOTH,
    OTHER_QUESTION,
    PORT_QUESTION,
    SEARCH,
    Json,
    assistant,
    called,
    json_schema,
    modest,
    searched,
    system,
    tool,
    user,
)

from utils.offline import CHAT_MODEL
from utils.offline.answers import REFUSAL, Passage, find_answer, parse_passages, relevance
from utils.offline.engine import EMPTY, NOTHING_GIVEN, complete
from utils.offline.policy import RULES
from utils.offline.protocol import ApiError, ChatRequest
from utils.offline.text import markdown_sentences, split_sentences, stem

PORT_ANSWER = "Milvus listens for clients on port 19530. [milvus-ports]"


def reply(*messages: Json, **options: Any) -> str | list[tuple[str, Json]]:
    """The engine's answer, or its calls."""
    request = ChatRequest.model_validate({"model": CHAT_MODEL, "messages": list(messages), **options})
    completion = complete(request)
    return [(call.name, call.arguments) for call in completion.calls] or completion.text


def answer(*messages: Json, **options: Any) -> str:
    text = reply(*messages, **options)
    assert isinstance(text, str)
    return text


def calls(*messages: Json, tools: list[Json], **options: Any) -> list[tuple[str, Json]]:
    made = reply(*messages, tools=tools, **options)
    return made if isinstance(made, list) else []


# Answers


@pytest.mark.parametrize("form", [json.dumps, lambda documents: yaml.dump(documents, allow_unicode=True)])
def test_it_quotes_what_fits_and_cites_the_document(form: Any) -> None:
    assert answer(*searched(PORT_QUESTION, form(BOTH))) == PORT_ANSWER
    backup = answer(*searched(BACKUP_QUESTION, form(BOTH)))
    assert backup.startswith("The tool `milvus-backup` copies a collection to object storage.")
    assert backup.endswith("[milvus-backup]")


def test_it_declines_what_the_passages_do_not_answer() -> None:
    for question in (OTHER_QUESTION, "Who won the football match in Madrid yesterday?", "What does Redis Sentinel do?"):
        assert answer(*searched(question, BOTH)) == REFUSAL
    assert answer(*searched("", BOTH)) == REFUSAL
    assert answer(*searched("the of and?", BOTH)) == REFUSAL


def test_an_empty_knowledge_base_and_a_failed_search_say_so() -> None:
    for nothing in ("No documents found", "", " \n"):
        assert answer(*searched(PORT_QUESTION, nothing)) == EMPTY
    failed = answer(*searched(PORT_QUESTION, "Error searching knowledge base: ConnectError: no server"))
    assert failed == "The search failed (ConnectError: no server), so there is nothing to answer from."
    # One of two searches found something: that is answered.
    nothing_more = called("search_web", {"query": "x"}, "No documents found")
    assert answer(*searched(PORT_QUESTION, BOTH), *nothing_more) == PORT_ANSWER


def test_without_anything_to_quote_it_says_what_it_is() -> None:
    assert answer(user("What is the capital of France?")) == NOTHING_GIVEN
    assert answer(system("You are kind.")) == NOTHING_GIVEN


words = st.sampled_from(
    ["Milvus", "port", "collection", "index", "backup", "vector", "memory", "cluster", "node", "query", "`load`"]
    + ["storage", "the", "a", "is", "of", "on", "19530", "9091"]
)
sentences = st.builds(
    lambda parts, end: " ".join(parts).capitalize() + end,
    st.lists(words, min_size=3, max_size=12),
    st.sampled_from(".!?"),
)
markdown_documents = st.lists(
    st.tuples(st.sampled_from(["", "# ", "- ", "> "]), st.lists(sentences, min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
).map(lambda blocks: "\n\n".join(start + " ".join(block) for start, block in blocks))
any_document = markdown_documents | st.text(st.characters(exclude_categories=["Cs"]), max_size=150)
questions = sentences | st.sampled_from([PORT_QUESTION, BACKUP_QUESTION, "How much memory does an index need?"])


@modest
@given(texts=st.lists(any_document, min_size=1, max_size=5), question=questions)
def test_every_quote_stands_in_the_document_it_cites(texts: list[str], question: str) -> None:
    passages = [Passage(text, f"doc-{number}") for number, text in enumerate(texts)]
    found = find_answer(question, passages)
    for quote in found.quotes:
        document = texts[int(quote.source.removeprefix("doc-"))]
        assert quote.text in {sentence.text for sentence in markdown_sentences(document)}
    assert 0 <= found.confidence <= 1
    assert len({quote.text for quote in found.quotes}) == len(found.quotes)
    assert found.answered or found.text == REFUSAL
    scores = relevance(question, texts)
    assert len(scores) == len(texts) and all(score == score for score in scores)


@modest
@given(blocks=st.lists(st.lists(sentences, min_size=1, max_size=4), min_size=1, max_size=4), question=questions)
def test_an_answer_is_made_of_sentences_and_ids_alone(blocks: list[list[str]], question: str) -> None:
    documents: list[Json] = [
        {"content": " ".join(block), "name": "other", "meta_data": {"id": f"doc-{n}"}} for n, block in enumerate(blocks)
    ]
    text = answer(*searched(question, documents))
    if text == REFUSAL:
        return
    for paragraph in text.split("\n\n"):
        match = re.fullmatch(r"(.*) \[doc-(\d+)\]", paragraph, re.S)
        assert match, paragraph
        allowed = {sentence.text for sentence in markdown_sentences(documents[int(match[2])]["content"])}
        assert all(sentence in allowed for line in match[1].splitlines() for sentence in split_sentences(line))


@modest
@given(text=any_document)
def test_a_plain_text_result_loses_nothing_but_citations(text: str) -> None:
    passages = parse_passages(text, "given")
    assert all(passage.text in text for passage in passages)
    assert all(passage.source for passage in passages)


def test_the_source_is_the_documents_id_else_its_name() -> None:
    def source(document: Json) -> str:
        (passage,) = parse_passages(json.dumps([{"content": "Text here.", **document}]), "given")
        return passage.source

    assert source({"name": "n", "meta_data": {"id": "i"}}) == "i"
    assert source({"name": "n", "meta_data": {"chunk": 1}}) == "n"
    assert source({"name": "n", "meta_data": '{"id": "i"}'}) == "n"
    assert source({"name": None, "meta_data": None}) == "given"
    assert parse_passages("It is so. [doc-a]\n\nAnd so [doc-b].") == [
        Passage("It is so.", "doc-a"),
        Passage("And so.", "doc-b"),
    ]


def test_a_code_block_comes_with_the_sentence_that_announces_it() -> None:
    content = "Load the collection before you search it:\n\n```python\nclient.load()\n```\n"
    text = answer(*searched("How do I load the collection before I search it?", [{"name": "load", "content": content}]))
    assert text == "Load the collection before you search it:\n```python\nclient.load()\n``` [load]"


def test_two_questions_get_an_answer_each() -> None:
    two = searched(f"{PORT_QUESTION} {BACKUP_QUESTION}", BOTH, PORT_QUESTION)
    text = answer(*two, *called("search_knowledge_base", {"query": BACKUP_QUESTION}, json.dumps(BOTH), 1))
    assert "port 19530" in text and "milvus-backup" in text
    assert "[milvus-ports]" in text and "[milvus-backup]" in text


def test_references_that_came_with_the_message() -> None:
    references = f"<references>\n{json.dumps(BOTH)}\n</references>"
    lead = "Use the following references from the knowledge base if it helps:"
    assert answer(user(f"{PORT_QUESTION}\n\n{lead}\n{references}")) == PORT_ANSWER
    assert answer(user(f"{OTHER_QUESTION}\n\n{lead}\n{references}")) == REFUSAL
    # They are no reason not to search, and they are not part of the question.
    assert calls(user(f"{PORT_QUESTION}\n\n{lead}\n{references}"), tools=[SEARCH]) == [
        ("search_knowledge_base", {"query": PORT_QUESTION})
    ]


def test_what_other_members_said_is_quoted_with_their_citations() -> None:
    context = (
        "<member_interaction_context>\nSee below interactions with other team members.\n"
        f"Member: Analyst\nTask: {PORT_QUESTION}\nResponse: {PORT_ANSWER}\n\n</member_interaction_context>"
    )
    assert answer(user(f"Write about the port for clients.\n{context}")) == PORT_ANSWER
    refused = context.replace(PORT_ANSWER, REFUSAL)
    assert answer(user(f"Write about the port for clients.\n{refused}")) == NOTHING_GIVEN


def test_a_text_in_the_message_is_quoted() -> None:
    filler = "The web interface is made for people who want to look around and needs no account at all. " * 4
    text = answer(user(f"{PORT_QUESTION}\n\nMilvus listens for clients on port 19530. {filler}"))
    assert "port 19530" in text


def test_the_conversation_in_a_system_message_is_summarised() -> None:
    talk = f"<conversation>User: {PORT_QUESTION}\nAssistant: {PORT_ANSWER}\n</conversation>"
    summary = answer(system(f"Analyze this.{talk}"), user("Provide the summary of the conversation."))
    assert summary == PORT_ANSWER


def test_other_tools_results_are_handed_on() -> None:
    assert answer(user("What is 6 times 7?"), *called("multiply", {"a": 6, "b": 7}, "42")) == "multiply returned: 42"


def test_questions_about_the_conversation_quote_the_user() -> None:
    talk = [user(PORT_QUESTION), assistant(PORT_ANSWER), user(BACKUP_QUESTION), assistant("x")]
    assert answer(*talk, user("What did I ask first?")) == f'You asked: "{PORT_QUESTION}"'
    assert answer(*talk, user("What was my last question?")) == f'You asked: "{BACKUP_QUESTION}"'
    assert answer(user("What did I ask before?")) == "This conversation holds nothing about that yet."
    assert calls(*talk, user("What did I ask first?"), tools=[SEARCH]) == []


def test_questions_about_the_user_quote_what_they_said_or_what_is_remembered() -> None:
    said = user("My name is Ada. I prefer short answers. Which port?")
    assert answer(said, assistant("x"), user("What is my name?")) == "You told me: My name is Ada."
    memories = "<memories_from_previous_interactions>\n- My name is Bo.\n</memories_from_previous_interactions>"
    assert answer(system(memories), user("What is my name?")) == "You told me: My name is Bo."
    assert answer(user("My name is Ada.")) == "You said: My name is Ada."


def test_json_answers_say_whether_there_was_one() -> None:
    schema = {"type": "object", "properties": {"answered": {"type": "boolean"}, "sources": {"type": "array"}}}
    wanted = json_schema({**schema, "required": ["answered", "sources"]})
    for question, expected in ((PORT_QUESTION, True), (OTHER_QUESTION, False)):
        assert json.loads(answer(*searched(question, BOTH), response_format=wanted))["answered"] is expected


def test_stems_are_the_same_from_many_threads() -> None:
    """The stemmer keeps the word it works on in the object that all threads share."""
    ends = ("ations", "ingly", "fulness", "ies") * 8
    words = [f"{start}{middle}{end}" for start in "abcdefghij" for middle in ("lk", "rt", "nd") for end in ends]
    stem.cache_clear()
    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(stem.__wrapped__, words))
    assert at_once == [stem.__wrapped__(word) for word in words]


# The policy, one test a rule


def query(*messages: Json) -> str:
    ((_, arguments),) = calls(*messages, tools=[SEARCH])
    return str(arguments["query"])


def test_rule_search() -> None:
    assert query(user(PORT_QUESTION)) == PORT_QUESTION
    # Once a turn, and again in the next.
    first = searched(PORT_QUESTION, BOTH)
    assert calls(*first, tools=[SEARCH]) == []
    assert query(*first, assistant(PORT_ANSWER), user(BACKUP_QUESTION)) == BACKUP_QUESTION
    for name in ("search_docs", "retrieve_documents", "web_search", "search", "find_pages", "lookup_term"):
        assert calls(user(PORT_QUESTION), tools=[tool(name, "", query="string")]) == [(name, {"query": PORT_QUESTION})]
    for name in ("research", "findings", "get_search_results"):
        assert calls(user(PORT_QUESTION), tools=[tool(name, "", query="string")]) == []
    # Nothing to look up, nothing to look it up with.
    assert calls(user("and the of?"), tools=[SEARCH]) == []
    assert calls(user(PORT_QUESTION), tools=[tool("search_by_number", "", number="integer")]) == []


def test_rule_search_takes_a_follow_up_with_what_it_follows() -> None:
    before = [user(PORT_QUESTION), assistant(PORT_ANSWER)]
    assert query(*before, user("And for metrics?")) == f"{PORT_QUESTION} And for metrics?"
    assert query(*before, user("Can I change it?")) == f"{PORT_QUESTION} Can I change it?"
    assert query(*before, user(BACKUP_QUESTION)) == BACKUP_QUESTION


def test_rule_search_splits_a_compound_question() -> None:
    def queries(text: str) -> list[str]:
        return [arguments["query"] for _, arguments in calls(user(text), tools=[SEARCH])]

    assert queries(f"{PORT_QUESTION} {BACKUP_QUESTION}") == [PORT_QUESTION, BACKUP_QUESTION]
    assert queries("Which port does Milvus use, and which tool copies a collection?") == [
        "Which port does Milvus use",
        "which tool copies a collection?",
    ]
    assert queries("I run Milvus. Which port does Milvus use?") == ["Which port does Milvus use?"]
    assert queries(PORT_QUESTION) == [PORT_QUESTION]


def test_rule_memory() -> None:
    update, add = tool("update_user_memory", task="string"), tool("add_memory", memory="string")
    said = user("My name is Ada. Which port does Milvus use? I work on search.")
    assert calls(said, tools=[SEARCH, update]) == [
        ("update_user_memory", {"task": "Remember: My name is Ada. I work on search."})
    ]
    facts = [{"memory": "The user said: My name is Ada."}, {"memory": "The user said: I work on search."}]
    assert calls(said, tools=[add]) == [("add_memory", fact) for fact in facts]
    # Not twice, not what is known, not from a question, not without a fact.
    after = called("add_memory", facts[0], "ok")
    assert calls(said, *after, tools=[add]) == [("add_memory", facts[1])]
    assert calls(system("Known: My name is Ada."), user("My name is Ada."), tools=[add]) == []
    assert calls(user("Do you know that my name is Ada?"), tools=[add]) == []
    assert calls(user("Milvus is a database."), tools=[add]) == []


def test_rule_history() -> None:
    tools = [tool("get_chat_history"), tool("search_past_sessions"), SEARCH]
    asked = user("What did I ask first?")
    assert calls(asked, tools=tools) == [("get_chat_history", {})]
    assert calls(asked, tools=tools[1:]) == [("search_past_sessions", {})]
    assert calls(user(PORT_QUESTION), assistant("x"), asked, tools=tools[:1]) == []
    assert calls(asked, *called("get_chat_history", {}, "[]"), tools=tools[:1]) == []
    assert [name for name, _ in calls(user(PORT_QUESTION), tools=tools)] == ["search_knowledge_base"]


def team_system(mode: TeamMode, *, nested: bool = False) -> Json:
    """The system message that Agno writes for a team with an analyst and a writer."""
    analyst = Agent(name="Analyst", role="Finds facts about Milvus ports in the documents", telemetry=False)
    writer = Agent(name="Writer", role="Writes poems and greetings", telemetry=False)
    members: list[Agent | Team] = [analyst, writer]
    if nested:
        members = [Team(name="Desk", role="Answers", members=[analyst], telemetry=False), writer]
    team = Team(name="Lead", members=members, mode=mode, telemetry=False)
    team.initialize_team()
    message = team.get_system_message(session=TeamSession(session_id="s"))
    assert message is not None
    return system(str(message.content))


ONE = tool("delegate_task_to_member", "Delegate.", member_id="string", task="string")
ALL = tool("delegate_task_to_members", "Delegate to all.", task="string")
TASKS = [
    tool("create_task", title="string"),
    tool("execute_task", task_id="string", member_id="string"),
    tool("mark_all_complete", summary="string"),
]


def delegated(member: str) -> tuple[str, Json]:
    return "delegate_task_to_member", {"member_id": member, "task": PORT_QUESTION}


def test_rule_delegate_asks_every_member_in_turn() -> None:
    messages = [team_system(TeamMode.coordinate), user(PORT_QUESTION)]
    for member in ("analyst", "writer"):
        assert calls(*messages, tools=[ONE]) == [delegated(member)]
        messages += called(*delegated(member), PORT_ANSWER if member == "analyst" else REFUSAL, len(messages))
    assert reply(*messages, tools=[ONE]) == PORT_ANSWER


def test_rule_delegate_asks_all_at_once_if_told_so() -> None:
    asked = f"{PORT_QUESTION} Ask all in parallel."
    made = calls(team_system(TeamMode.coordinate), user(asked), tools=[ONE])
    assert made == [("delegate_task_to_member", {"member_id": m, "task": asked}) for m in ("analyst", "writer")]


def test_rule_delegate_routes_to_the_member_that_fits() -> None:
    route = team_system(TeamMode.route)
    assert calls(route, user(PORT_QUESTION), tools=[ONE]) == [delegated("analyst")]
    ((_, poem),) = calls(route, user("Write a poem as a greeting for Ada."), tools=[ONE])
    assert poem["member_id"] == "writer"
    assert calls(route, user(PORT_QUESTION), *called(*delegated("analyst"), PORT_ANSWER), tools=[ONE]) == []


def test_rule_delegate_knows_members_of_the_own_team_only() -> None:
    messages = [team_system(TeamMode.coordinate, nested=True), user(PORT_QUESTION)]
    assert calls(*messages, tools=[ONE]) == [delegated("desk")]
    messages += called(*delegated("desk"), PORT_ANSWER)
    assert calls(*messages, tools=[ONE]) == [delegated("writer")]


def test_rule_delegate_without_members_answers() -> None:
    assert reply(user(PORT_QUESTION), tools=[ONE]) == NOTHING_GIVEN


def test_rule_broadcast() -> None:
    messages = [team_system(TeamMode.broadcast), user(PORT_QUESTION)]
    call = ("delegate_task_to_members", {"task": PORT_QUESTION})
    assert calls(*messages, tools=[ALL]) == [call]
    result = f"Agent Analyst: {PORT_ANSWER}\n\nAgent Writer: {REFUSAL}"
    assert reply(*messages, *called(*call, result), tools=[ALL]) == PORT_ANSWER


def test_rule_tasks() -> None:
    messages = [team_system(TeamMode.tasks), user(PORT_QUESTION)]
    created = calls(*messages, tools=TASKS)
    assert [(name, a["assignee"], a["description"]) for name, a in created] == [
        ("create_task", "analyst", PORT_QUESTION),
        ("create_task", "writer", PORT_QUESTION),
    ]
    for number, (name, arguments) in enumerate(created):
        result = f"Task created: [id{number}] {arguments['title']} (status: pending)"
        messages += called(name, arguments, result, number)
    for number, member in enumerate(("analyst", "writer")):
        call = ("execute_task", {"task_id": f"id{number}", "member_id": member})
        assert calls(*messages, tools=TASKS) == [call]
        messages += called(*call, f"Task [id{number}] completed. Result: {PORT_ANSWER}", 10 + number)
    ((name, arguments),) = calls(*messages, tools=TASKS)
    assert (name, arguments) == ("mark_all_complete", {"summary": "2 of 2 tasks executed."})
    messages += called(name, arguments, "Goal marked as complete.")
    assert "port 19530" in answer(*messages, tools=TASKS)


WEATHER = tool(
    "get_weather",
    "Get the weather.",
    city="string",
    days="integer",
    unit={"type": "string", "enum": ["fahrenheit", "celsius"]},
)


def test_rule_other_takes_arguments_from_the_request() -> None:
    asked = user("Get the weather in Paris for 3 days in celsius.")
    filled = {"city": "Paris", "days": 3, "unit": "celsius"}
    assert calls(asked, tools=[WEATHER]) == [("get_weather", filled)]
    assert calls(asked, *called("get_weather", filled, "sunny"), tools=[WEATHER]) == []
    for missing in ("Get the weather in Paris in celsius.", "Get the weather in Paris for 3 days.", "Where is Paris?"):
        assert calls(user(missing), tools=[WEATHER]) == []
    multiply = tool("multiply", "Multiply.", a="number", b="number")
    assert calls(user("Please multiply -2.5 by 4."), tools=[multiply]) == [("multiply", {"a": -2.5, "b": 4})]
    send = tool("send_email", "Send.", to="string", subject="string")
    assert calls(user("send an email to 'ada@example.org' with subject “Ports”"), tools=[send]) == [
        ("send_email", {"to": "ada@example.org", "subject": "Ports"})
    ]
    note = tool("save_note", "Save.", text="string")
    asked = user("Save this note: buy milk")
    assert calls(asked, tools=[note]) == [("save_note", {"text": "Save this note: buy milk"})]
    assert calls(user("Restart the server now"), tools=[tool("restart_server")]) == [("restart_server", {})]


def test_rule_left_alone() -> None:
    for name in ("think", "analyze", "delete_memory", "clear_memory", "update_session_state"):
        request = user(f"Please {name.replace('_', ' ')} now: my name is Ada.")
        assert calls(request, tools=[tool(name, "", text="string")]) == []
        forced = calls(request, tools=[tool(name, "", text="string")], tool_choice="required")
        assert [called_name for called_name, _ in forced] == [name]


def test_rules_are_tried_in_the_order_of_the_table() -> None:
    kinds = ["memory", "history", "search", "broadcast", "delegate", "tasks", "left alone", "other"]
    assert [rule.kind for rule in RULES] == kinds
    tools = [WEATHER, ONE, SEARCH, tool("update_user_memory", task="string")]
    asked = user("I work in Paris. Get the weather in Paris for 3 days in celsius.")
    messages = [team_system(TeamMode.coordinate), asked]
    order = []
    while made := calls(*messages, tools=tools):
        order.append(made[0][0])
        for name, arguments in made:
            messages += called(name, arguments, "No documents found", len(messages))
    assert order == [
        "update_user_memory",
        "search_knowledge_base",
        "delegate_task_to_member",
        "delegate_task_to_member",
        "get_weather",
    ]


def test_a_forced_call_is_filled_as_well_as_it_can_be() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        ((name, arguments),) = calls(user("Hello there"), tools=[WEATHER], tool_choice=choice)
        assert name == "get_weather" and arguments == {"city": "Hello there", "days": 0, "unit": "fahrenheit"}
    calculator = tool("multiply", "Multiply two numbers.", a="integer", b="integer")
    ((name, arguments),) = calls(user("the product of 6 and 7"), tools=[WEATHER, calculator], tool_choice="required")
    assert (name, arguments) == ("multiply", {"a": 6, "b": 7})
    with pytest.raises(ApiError, match="no value"):
        calls(system("x"), tools=[tool("say", "", text="string")], tool_choice="required")
