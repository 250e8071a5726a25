"""The regression gate: quiet on an unchanged assistant, exit code 1 on a worse one, clear on a foreign baseline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pandas as pd
import pytest
import yaml
from agno.models.openai import OpenAILike

from utils import __main__ as command_line
from utils import lesson, models
from utils.assistant import Library, build_agent, open_library
from utils.bootstrap import ROOT
from utils.evals import (
    BASELINE,
    EvalError,
    Regression,
    allowed_drop,
    compare,
    conditions,
    eval_command,
    examine,
    judge_comparison,
    load_baseline,
    performance,
    sample,
    save_baseline,
)
from utils.knowledge import load_corpus, load_questions
from utils.models import Models
from utils.settings import Settings

QUESTIONS = 30
WORKFLOW = ROOT / "utils" / "deploy" / "ci" / "eval.yml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """COURSE_DATA of this module, so that the corpus is indexed once."""
    folder = tmp_path_factory.mktemp("evals").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DATA", str(folder))
        yield folder
    lesson.close_lite(folder)


@pytest.fixture(scope="module")
def library(data: Path) -> Iterator[Library]:
    opened = open_library(lesson.workspace("eval", fresh=False))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def table(library: Library) -> pd.DataFrame:
    """What the unchanged assistant reaches on a few questions."""
    return examine(build_agent(library), sample(QUESTIONS))


@pytest.fixture
def baseline(tmp_path: Path, table: pd.DataFrame, offline_models: Models) -> Path:
    path = tmp_path / "baseline.json"
    save_baseline(path, table, conditions(offline_models))
    return path


def gate(path: Path, data: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command as CI runs it, in a process and a folder of its own."""
    command = [sys.executable, "-m", "utils", "eval", "--baseline", str(path), "--questions", str(QUESTIONS), *options]
    environment = os.environ | {"COURSE_DATA": str(data)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_an_unchanged_assistant_passes_and_everything_is_shown(
    baseline: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_command(False, str(baseline), QUESTIONS, "reranked", None) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.endswith(" ok")]
    assert len(rows) == 7 and " worse" not in shown
    assert all(row[-4] == row[-3] and float(row[-2]) == 0 for row in rows), "same assistant, same numbers"
    assert "AccuracyEval and AgentAsJudgeEval are skipped: the extractive engine cannot judge" in shown
    assert re.search(r"not gated: a run takes [\d.]+ s, [\d.]+ times a search alone, and [\d.]+ MiB", shown)


def test_one_chunk_instead_of_ten_fails_the_gate_and_names_the_questions(
    baseline: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    result = gate(baseline, tmp_path, "--documents", "1")
    assert result.returncode == 1, result.stdout + result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("error: The assistant got worse in ") and "answers (" in sentence
    named = re.findall(r"[\w.-]+-\d+", sentence.partition(" on the questions ")[2])
    assert len(named) >= 5 and set(named) <= set(table.index)
    answers = next(line for line in result.stdout.splitlines() if line.startswith("answers, worse: "))
    assert set(answers.partition(": ")[2].split(", ")) <= set(table.index[table.answers == 1])


def test_an_agent_that_does_not_search_fails_the_gate(library: Library, table: pd.DataFrame) -> None:
    agent = build_agent(library)
    agent.search_knowledge = False
    asked = sample(QUESTIONS)[:8]
    found = compare(table, examine(agent, asked))
    assert found.questions["searches first"] == 8, "both runs are compared on the questions that both have"
    assert found.loc["searches first", ["now", "verdict"]].tolist() == [0.0, "worse"]
    assert found.now[["MRR", "right facts"]].tolist() == [0, 0]
    with pytest.raises(Regression, match=r"^The assistant got worse in .*searches first \(1.000 to 0.000\)") as error:
        judge_comparison(found)
    assert asked[0].id in str(error.value)


def test_the_stored_baseline_is_of_this_corpus_these_questions_and_the_offline_model(offline_models: Models) -> None:
    stored = load_baseline(BASELINE, conditions(offline_models))
    assert sorted(stored.index) == sorted(question.id for question in load_questions("dev"))
    assert stored["searches first"].eq(1).all() and stored["right facts"].mean() > 0.6


@pytest.mark.parametrize(("option", "more"), [("model", "gpt-5"), ("corpus", "0123"), ("questions", "4567")])
def test_a_foreign_baseline_is_refused_with_what_to_do(
    option: str, more: str, baseline: Path, offline_models: Models
) -> None:
    stored = json.loads(baseline.read_text())
    stored["conditions"][option] = more
    baseline.write_text(json.dumps(stored))
    own = conditions(offline_models)
    with pytest.raises(EvalError) as error:
        load_baseline(baseline, own)
    assert f"was made with another {option} ({more}, now {own[option]})" in str(error.value)
    assert f"python3 -m utils eval --save --baseline {baseline.name}." in str(error.value)


def test_a_changed_document_is_another_corpus(offline_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fewer = conditions(offline_models), load_corpus()[1:]
    monkeypatch.setattr("utils.evals.load_corpus", lambda: fewer)
    after = conditions(offline_models)
    assert {name for name in before if before[name] != after[name]} == {"corpus"}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"scores": {}}', '{"scores": 3, "conditions": {}}'])
def test_a_damaged_baseline_is_one_sentence(content: str, tmp_path: Path, offline_models: Models) -> None:
    (path := tmp_path / "baseline.json").write_text(content)
    with pytest.raises(EvalError, match=r"^The baseline .* cannot be read \(\w+\): bring it back from git, or store a"):
        load_baseline(path, conditions(offline_models))


def test_a_missing_baseline_ends_the_command_before_it_asks_anything(
    tmp_path: Path, offline_models: Models, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EvalError, match=r"^There is no baseline at .*/none.json: store one with python3 -m utils eval"):
        eval_command(False, str(tmp_path / "none.json"), None, "reranked", None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("questions", "documents"), [(9, None), (0, None), (None, 0), (None, -1)])
def test_too_few_questions_or_chunks_are_one_sentence(questions: int | None, documents: int | None) -> None:
    with pytest.raises(EvalError, match="^--questions is 10 or more, .* and --documents 1 or more"):
        eval_command(False, None, questions, "reranked", documents)


def test_a_stored_baseline_reads_as_it_was_and_holds_a_line_for_each_question(
    baseline: Path, table: pd.DataFrame, offline_models: Models
) -> None:
    pd.testing.assert_frame_equal(load_baseline(baseline, conditions(offline_models)), table, check_like=True)
    lines = baseline.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith('    "') and "MRR" in line for line in lines) == table.MRR.count()


@pytest.mark.parametrize(
    ("drops", "allowed"),
    [
        ([0.0] * 50, 0),
        ([1.0] * 4 + [0.0] * 16, 4 / 20),  # four the same way happens by chance in 1 of 16
        ([1.0] * 5 + [0.0] * 15, 3 / 20),  # five in 1 of 32, so five are too many
        ([1.0, -1.0] * 5 + [0.0] * 10, 6 / 20),  # ten changes: a sum of 6 or more has 56/1024, of 8 or more 11/1024
    ],
)
def test_the_allowed_drop_is_that_of_a_sign_test(drops: list[float], allowed: float) -> None:
    assert allowed_drop(drops) == pytest.approx(allowed)


def one(name: str, values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({name: values}, [f"q-{i}" for i in range(len(values))])


@pytest.mark.parametrize(
    ("worse", "better", "verdict"), [(4, 0, "ok"), (5, 0, "worse"), (7, 4, "ok"), (12, 3, "worse")]
)
def test_changes_that_chance_explains_pass(worse: int, better: int, verdict: str) -> None:
    before = [1.0] * worse + [0.0] * better + [1.0] * 40
    now = [0.0] * worse + [1.0] * better + [1.0] * 40
    found = compare(one("right facts", before), one("right facts", now)).loc["right facts"]
    assert found.verdict == verdict and found.changed == [f"q-{i}" for i in range(worse)]


def test_a_single_run_without_a_search_is_too_many() -> None:
    before = pd.DataFrame({"searches first": [1.0] * 9})
    now = pd.DataFrame({"searches first": [1.0] * 8 + [0.0]})
    assert compare(before, now).loc["searches first", "verdict"] == "worse"


def test_many_questions_are_named_in_part() -> None:
    found = compare(one("MRR", [1.0] * 30), one("MRR", [0.5] * 30))
    with pytest.raises(Regression, match=r"in MRR \(1.000 to 0.500\) on the questions q-0, q-1, .*q-9 and 20 more\.$"):
        judge_comparison(found)


def test_a_run_that_fails_is_not_taken_for_bad_quality(library: Library, closed_port: int) -> None:
    agent = build_agent(library)
    agent.model = OpenAILike(id="any", base_url=f"http://127.0.0.1:{closed_port}/v1", api_key="none", max_retries=0)
    asked = sample(1)
    with pytest.raises(EvalError, match=f"^The model did not answer the question {asked[0].id}: "):
        examine(agent, asked)


def test_a_search_that_fails_is_not_taken_for_bad_quality(library: Library) -> None:
    agent = build_agent(library, mode="no such mode")
    with pytest.raises(EvalError, match="^The search for the question .* failed: run python3 -m utils doctor"):
        examine(agent, sample(1))


def test_judged_questions_get_a_verdict_and_a_score(library: Library) -> None:
    """With the extractive engine as judge, which shows both evals at work, and that it cannot judge: all is wrong."""
    asked = [question for question in sample(QUESTIONS) if question.answerable][:2]
    found = examine(build_agent(library), asked, models.chat_model())
    assert found["right facts"].tolist() == [1.0, 1.0]
    assert found.judge.tolist() == [0.0, 0.0] and found.accuracy.tolist() == [0.0, 0.0]


def test_a_baseline_without_a_measure_is_not_taken_for_a_pass() -> None:
    before, now = one("MRR", [1.0, 1.0]), one("MRR", [0.0, 0.0]).assign(judge=1.0)
    with pytest.raises(EvalError, match="^The baseline and this run have no judge in common: store"):
        compare(before, now)
    with pytest.raises(EvalError, match="^The baseline and this run have no MRR in common: store"):
        compare(before, now[["MRR"]].rename(lambda name: f"other-{name}"))


def test_the_sample_is_of_the_dev_split_and_fixed() -> None:
    assert {question.split for question in sample()} == {"dev"} and len(sample()) == len(load_questions("dev"))
    assert sample(20) == sample(20) and len(sample(20)) == len(set(sample(20))) == 20
    assert not all(question.answerable for question in sample(20))
    assert len(sample(10_000)) == len(sample())


def test_performance_is_told_and_not_gated(library: Library) -> None:
    assert performance(build_agent(library), library, sample(1)[0], "dense").startswith("not gated: a run takes ")


def workflow() -> dict[Any, Any]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def test_the_workflow_follows_the_schema_of_github() -> None:
    folder = files("check_jsonschema") / "builtin_schemas/vendor"
    validator = jsonschema_rs.validator_for(json.loads((folder / "github-workflows.json").read_text("utf-8")))
    loaded = workflow() | {"on": workflow()[True]}  # YAML 1.1 reads the key `on` as true
    del loaded[True]
    assert [error.message for error in validator.iter_errors(loaded)] == []
    loaded["jobs"]["eval"]["timeout"] = 20
    assert not validator.is_valid(loaded), "the schema would not notice a key that does not exist"


def test_the_workflow_runs_commands_that_exist_on_a_provider_that_needs_no_key() -> None:
    job = workflow()["jobs"]["eval"]
    commands = [step["run"].split() for step in job["steps"] if "run" in step]
    assert commands == [["python3", "-m", "utils", "eval"]]
    assert command_line.parser().parse_args(commands[0][3:]).command == "eval"
    assert job["env"] == {"MODEL_PROVIDER": Settings().provider}
    watched = workflow()[True]["pull_request"]["paths"]
    assert all(list(ROOT.glob(path.removesuffix("/**"))) for path in watched)
