"""`python3 -m utils eval`: the regression gate. It asks the assistant labelled questions and compares with a baseline.

Each answer is examined by Agno's ReliabilityEval (was the knowledge base searched?), by its key facts and, where a
language model can judge, by AgentAsJudgeEval and AccuracyEval; PerformanceEval times one run. Retrieval is measured on
what the runs retrieved. The questions are those of the dev split: the test split stays unseen, so that what it says is
no result of tuning. (Agno's `run_cases` needs an event loop of its own, which a notebook does not let it have.)

Every measure is a number from 0 to 1 for each question, and larger is better. The baseline holds them all, so both
runs are compared question by question. A measure may drop as far as chance takes it: the 95th percentile of what its
mean changes by when the sign of each question's change is drawn at random (a paired permutation test). A few questions
worse and others better is no alarm, five worse and none better is one. Eight measures are tested, so a change that
only shuffles answers raises a false alarm now and then; an unchanged assistant never does.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from agno.agent import Agent, RunOutput
from agno.eval import AccuracyEval, AgentAsJudgeEval, PerformanceEval, ReliabilityEval
from agno.knowledge.document import Document
from agno.models.base import Model
from agno.run.base import RunStatus
from scipy import stats
from tqdm import tqdm

from utils import lesson, models
from utils.assistant import DOCUMENTS, Library, build_agent, open_library
from utils.bootstrap import ROOT
from utils.errors import CourseError
from utils.faithfulness import is_refusal
from utils.knowledge import Question, load_corpus, load_questions
from utils.offline import CHAT_MODEL
from utils.offline.conversation import SEARCH_ERROR
from utils.retrieval_quality import interval, measure
from utils.settings import load_settings

BASELINE = ROOT / "data" / "benchmarks" / "eval_baseline.json"
SEARCH_TOOL = "search_knowledge_base"
RETRIEVAL = ("recall@5", "MRR", "answer@5")
RELIABILITY = "searches first"  # a run without a search is a defect, whatever chance says: no drop is allowed
JUDGED = 10
LANGUAGE_MODEL_QUESTIONS = 40
SEED = 8
CHANCE = 0.95
FEWEST = 10
NAMED = 10


class EvalError(CourseError):
    """The evaluation could not be run or compared."""


class Regression(CourseError):
    """The assistant got worse than the baseline by more than chance explains."""


def sample(count: int | None = None) -> list[Question]:
    """All questions of the dev split, or a random but fixed `count` of them."""
    questions = sorted(load_questions("dev"), key=lambda question: question.id)
    return questions if count is None else random.Random(SEED).sample(questions, min(count, len(questions)))


def examine(agent: Agent, questions: Sequence[Question], judge: Model | None = None) -> pd.DataFrame:
    """Ask the agent every question and measure what it retrieved and said.

    Args:
        agent: searches with a tool called search_knowledge_base.
        questions: labelled questions, some that the corpus does not answer.
        judge: grades the first answerable questions; None leaves these two measures out.

    Returns:
        One row a question, indexed by its id; a number from 0 to 1 for each measure, larger is better, NaN where a
        question has none: retrieval measures, "right facts" and "answers" (does not decline) if the corpus answers it,
        "declines" if it does not, "searches first" always, "judge" and "accuracy" for the judged ones.

    Raises:
        EvalError: a run or its search failed, which says nothing about quality.
    """
    judged = [question.id for question in questions if question.answerable][:JUDGED] if judge else []
    found: dict[str, list[Document]] = {}
    rows: dict[str, dict[str, float]] = {}
    for question in tqdm(questions, desc="asking", unit=" questions", leave=False, disable=None):
        run = _run(agent, question)
        answer = str(run.content)
        refused = is_refusal(answer)
        found[question.id] = _documents(run)
        row = rows[question.id] = {RELIABILITY: _searched(run)}
        if question.answerable:
            row["right facts"] = float(not refused and question.holds_key_facts(answer))
            row["answers"] = float(not refused)
        else:
            row["declines"] = float(refused)
        if judge and question.id in judged:
            row["judge"], row["accuracy"] = _judge(question, answer, judge), _accuracy(question, answer, judge)
    table = measure(found, questions)[list(RETRIEVAL)]
    return table.join(pd.DataFrame.from_dict(rows, orient="index"), how="right").round(4)


def _run(agent: Agent, question: Question) -> RunOutput:
    run = agent.run(question.question)
    if run.status != RunStatus.completed:
        raise EvalError(f"The model did not answer the question {question.id}: {run.content}")
    if any(str(tool.result).startswith(SEARCH_ERROR) for tool in run.tools or []):
        raise EvalError(f"The search for the question {question.id} failed: run python3 -m utils doctor.")
    return run


def _documents(run: RunOutput) -> list[Document]:
    found = [document for references in run.references or [] for document in references.references or []]
    return [Document.from_dict(document) for document in found if isinstance(document, dict)]


def _searched(run: RunOutput) -> float:
    result = ReliabilityEval(
        agent_response=run,
        expected_tool_calls=[SEARCH_TOOL],
        allow_additional_tool_calls=True,
        show_spinner=False,
        telemetry=False,
    ).run()
    return float(result is not None and result.eval_status == "PASSED")


def _judge(question: Question, answer: str, judge: Model) -> float:
    """1 or 0: whether the judge finds the key facts in the answer; NaN if it gave no verdict."""
    graded = AgentAsJudgeEval(
        criteria=f"The answer states: {_expected(question)}", model=judge, show_spinner=False, telemetry=False
    ).run(input=question.question, output=answer)
    return float(graded.results[0].passed) if graded and graded.results else np.nan


def _accuracy(question: Question, answer: str, judge: Model) -> float:
    """The judge's score of an answer, 1 to 10, as a tenth of it; NaN if it gave none."""
    graded = AccuracyEval(
        input=question.question, expected_output=_expected(question), model=judge, telemetry=False
    ).run_with_output(output=answer, print_summary=False, print_results=False)
    return graded.results[0].score / 10 if graded and graded.results else np.nan


def _expected(question: Question) -> str:
    return "; ".join(fact.replace("|", " or ") for fact in question.key_facts)


def allowed_drop(drops: Sequence[float]) -> float:
    """How far the mean may drop by chance: see the module's description.

    Args:
        drops: baseline minus now, one number for each question.
    """
    changed = [drop for drop in drops if drop]
    if not changed:
        return 0.0
    # The zero changes no sum, and the test wants two numbers at least. Exact for up to 13 changed questions.
    drawn = stats.permutation_test(
        ([*changed, 0.0],), np.sum, permutation_type="samples", n_resamples=20_000, rng=SEED
    ).null_distribution
    return float(np.quantile(drawn, CHANCE, method="inverted_cdf")) / len(drops)


def compare(before: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Both runs, measure by measure, on the questions that both asked.

    Returns:
        One row a measure: questions, baseline, now, allowed drop, verdict ("ok" or "worse"), and changed: the ids of
        the questions that got worse, the largest drops first.

    Raises:
        EvalError: for some measure the runs have no question in common.
    """
    known = before.reindex(index=now.index, columns=now.columns)
    changes = known - now
    if lacking := [name for name in now.columns if changes[name].isna().all()]:
        raise EvalError(
            f"The baseline and this run have no {', '.join(lacking)} in common: store a new baseline with "
            "python3 -m utils eval --save."
        )
    rows = {}
    for name in now.columns:
        drops = changes[name].dropna()
        allowed = 0.0 if name == RELIABILITY else allowed_drop(drops.tolist())
        worse = drops[drops > 0].sort_values(ascending=False, kind="stable").index.tolist()
        verdict = "worse" if drops.mean() > allowed + 1e-9 else "ok"
        both = drops.index
        rows[name] = (len(drops), known[name][both].mean(), now[name][both].mean(), allowed, verdict, worse)
    columns = ["questions", "baseline", "now", "allowed drop", "verdict", "changed"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("measure")


def judge_comparison(table: pd.DataFrame) -> None:
    """Nothing if every measure of `compare` is ok.

    Raises:
        Regression: at least one dropped further than allowed; the sentence names the questions that got worse.
    """
    failed = table[table.verdict == "worse"]
    if failed.empty:
        return
    drops = ", ".join(f"{row.Index} ({row.baseline:.3f} to {row.now:.3f})" for row in failed.itertuples())
    names = list(dict.fromkeys(name for changed in failed.changed for name in changed))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise Regression(f"The assistant got worse in {drops} on the questions {', '.join(names[:NAMED])}{more}.")


def conditions(found: models.Models) -> dict[str, str]:
    """What has to be the same for two runs to be comparable: the models, and digests of corpus and dev questions."""
    return {
        "model": found.chat.model_id,
        "embedder": found.embedding.model_id,
        "corpus": _digest([asdict(text) for text in load_corpus()]),
        "questions": _digest([asdict(question) for question in sample()]),
    }


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def save_baseline(path: Path, table: pd.DataFrame, made_with: dict[str, str]) -> None:
    """Store a run of `examine`, one line a question."""
    packages = {name: version(name) for name in ("agno", "pymilvus", "milvus-lite", "wordllama")}
    head = {"date": date.today().isoformat(), "versions": packages, "conditions": made_with}
    lines = [f"    {json.dumps(id_)}: {row.dropna().to_json()}" for id_, row in table.iterrows()]
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "scores": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def load_baseline(path: Path, made_with: dict[str, str]) -> pd.DataFrame:
    """The stored run, if it may be compared with one under these conditions.

    Raises:
        EvalError: there is none, it cannot be read, or it was made under other conditions; the sentence says what to
            do.
    """
    shown = lesson.show_path(path)
    own = "python3 -m utils eval --save" + ("" if path == BASELINE else f" --baseline {path.name}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        table = pd.DataFrame(stored["scores"], dtype=float).T
        before = {name: str(stored["conditions"][name]) for name in made_with}
    except FileNotFoundError:
        raise EvalError(f"There is no baseline at {shown}: store one with {own}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"The baseline {shown} cannot be read ({type(error).__name__}): bring it back from git, or store a new one "
            f"with {own}."
        ) from None
    if other := [name for name in made_with if made_with[name] != before[name]]:
        differs = " and ".join(f"{name} ({before[name]}, now {made_with[name]})" for name in other)
        raise EvalError(
            f"The baseline {shown} was made with another {differs}: compare like with like, or store a baseline of "
            f"this one with {own}."
        )
    return table


def performance(agent: Agent, library: Library, question: Question, mode: str) -> str:
    """One line on time and memory. Not gated: machines differ, and so does one machine from hour to hour."""

    def median(call: Any, memory: bool) -> tuple[float, float]:
        result = PerformanceEval(
            func=call, measure_memory=memory, warmup_runs=1, num_iterations=3, show_spinner=False, telemetry=False
        ).run()
        return result.median_run_time, result.median_memory_usage

    run, mebibytes = median(lambda: agent.run(question.question), True)
    search, _ = median(lambda: library.search(question.question, mode=mode), False)
    return (
        f"not gated: a run takes {run:.3f} s, {run / search:.1f} times a search alone, and {mebibytes:.1f} MiB of this "
        "process's memory"
    )


def eval_command(save: bool, baseline: str | None, questions: int | None, mode: str, documents: int | None) -> int:
    """Evaluate the assistant, print the comparison with the baseline (or store a new one), and judge it.

    Args:
        save: store this run as the baseline instead of comparing.
        baseline: its file (default: `BASELINE`).
        questions: how many (default: all that the dev split has; 40 for a language model).
        mode: how the assistant searches, see `Library.search`.
        documents: how many chunks it reads (default: as many as `ask`).

    Raises:
        Regression: it got worse.
        EvalError: it could not be evaluated or compared.
    """
    if questions is not None and questions < FEWEST or documents is not None and documents < 1:
        raise EvalError(
            f"--questions is {FEWEST} or more, since fewer say little about quality, and --documents 1 or more."
        )
    found = models.connect(load_settings())
    extractive = found.chat.model_id == CHAT_MODEL
    path, made_with = Path(baseline) if baseline else BASELINE, conditions(found)
    before = None if save else load_baseline(path, made_with)
    folder = lesson.workspace("eval", fresh=False)
    library = open_library(folder, progress=True)
    agent = build_agent(library, mode, documents or DOCUMENTS.get(found.chat.provider, 10))
    asked = sample(questions or (None if extractive else LANGUAGE_MODEL_QUESTIONS))
    print(f"{len(asked)} questions of the dev split, answered by {found.chat} on {lesson.describe_milvus(folder)}")
    if extractive:
        print(
            "AccuracyEval and AgentAsJudgeEval are skipped: the extractive engine cannot judge, a language model can."
        )
    else:
        print(f"AccuracyEval and AgentAsJudgeEval: {found.chat} judges its own answers, so look at some yourself.")
    now = examine(agent, asked, None if extractive else models.chat_model(found))
    if before is None:
        means = {
            name: (values.count(), values.mean(), *interval(values.dropna().tolist())) for name, values in now.items()
        }
        columns = ["questions", "now", "low", "high"]
        print(pd.DataFrame.from_dict(means, orient="index", columns=columns).round(3).to_string())
        save_baseline(path, now, made_with)
        print(f"stored as the baseline {lesson.show_path(path)}")
    else:
        table = compare(before, now)
        print(table.drop(columns="changed").round(3).to_string())
        for name, row in table[table.verdict == "worse"].iterrows():
            print(f"{name}, worse: {', '.join(row.changed)}")
    print(performance(agent, library, asked[0], mode))
    library.close()
    if before is not None:
        judge_comparison(table)
    return 0
