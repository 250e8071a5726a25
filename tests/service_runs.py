"""Runs of a service as a client makes them: streamed, and in the background."""

from __future__ import annotations

import json
from typing import Any

import httpx
from waiting import wait_for


def stream_run(api: httpx.Client, path: str, message: str, **fields: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a streamed run: each one's name and its data."""
    events = []
    with api.stream("POST", path, data={"message": message, **fields}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append((name, json.loads(line[6:])))
    return events


def background_run(api: httpx.Client, path: str, message: str, session_id: str, **fields: str) -> dict[str, Any]:
    """Start a run in the background, and poll it until it has ended."""
    form = {"message": message, "stream": "false", "background": "true", "session_id": session_id, **fields}
    answer = api.post(path, data=form)
    assert answer.status_code == 202, answer.text

    def found() -> dict[str, Any]:
        return dict(api.get(f"{path}/{answer.json()['run_id']}", params={"session_id": session_id}).json())

    assert wait_for(lambda: found()["status"] not in ("PENDING", "RUNNING"))
    return found()
