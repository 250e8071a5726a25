"""The command line: python3 -m utils lab | test | run | ask | eval | serve | model | milvus | bench | doctor.

Standard library only: everything that needs a package is imported after the environment is there.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from typing import List, Optional

from utils import bootstrap
from utils.errors import CourseError


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="python3 -m utils", description="Commands of the course.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", metavar="command")

    lab = commands.add_parser("lab", help="set up what is missing and open the notebooks in JupyterLab")
    lab.add_argument("--port", type=int, help="the port to listen on (default: the first free one from 8888)")
    lab.add_argument("--no-browser", action="store_true", help="print the address only")

    test = commands.add_parser(
        "test",
        help="run the whole test suite; other arguments go to pytest (-k, -x, a path)",
        allow_abbrev=False,
    )
    test.add_argument("--quick", action="store_true", help="leave the notebooks out")
    test.add_argument(
        "--local-model",
        action="store_true",
        help="run the tests of the model server, and the notebooks, with the small local model (fetched if needed)",
    )

    run = commands.add_parser("run", help="run notebooks without a browser")
    run.add_argument("notebooks", nargs="*", metavar="NN", help="numbers or names: 2, 02, 02_knowledge_assistant")
    run.add_argument("--all", action="store_true", help="every notebook")
    run.add_argument("--save", action="store_true", help="store the outputs (run with the offline model)")

    ask = commands.add_parser("ask", help="answer one question from data/knowledge")
    ask.add_argument("question")

    gate = commands.add_parser("eval", help="measure the assistant on labelled questions; fails if it got worse")
    gate.add_argument("--save", action="store_true", help="store the result as the baseline, instead of comparing")
    gate.add_argument("--baseline", metavar="FILE", help="default: data/benchmarks/eval_baseline.json")
    gate.add_argument("--questions", type=int, metavar="N", help="only so many (default: 131; 40 for language models)")
    gate.add_argument(
        "--mode",
        choices=["dense", "words", "both", "reranked"],
        default="reranked",
        help="search by embeddings, by words (BM25), by both, or by both with a reranker (default: %(default)s)",
    )
    gate.add_argument("--documents", type=int, metavar="N", help="chunks that the model reads (default: as for ask)")

    serve = commands.add_parser("serve", help="run an assistant as a service (settings: utils/hosting/config.py)")
    serve.add_argument(
        "--app",
        choices=["knowledge_agent", "research_team"],
        default="knowledge_agent",
        help="which (default: %(default)s)",
    )

    model = commands.add_parser("model", help="fetch, list or remove language models for MODEL_PROVIDER=local")
    model.add_argument("action", choices=["fetch", "list", "remove"])
    model.add_argument(
        "what", nargs="?", help="small, default, a GGUF file, or owner/repository of the Hugging Face hub"
    )

    milvus = commands.add_parser("milvus", help="run a Milvus server in the foreground, without Docker")
    milvus.add_argument(
        "kind", choices=["standalone", "cluster", "lite"], help="lite runs everywhere, the others on Linux"
    )
    milvus.add_argument("--folder", help="for its data and logs (default: data/local/milvus-KIND)")
    milvus.add_argument("--port", type=int, help="the port to listen on (default: a free one)")
    milvus.add_argument("--query-nodes", type=int, metavar="N", help="query nodes of a cluster (default: 2)")

    bench = commands.add_parser("bench", help="measure on this machine what the notebooks show stored results of")
    bench.add_argument("what", choices=["index"], help="indexes of Milvus, from ten thousand to ten million vectors")
    bench.add_argument("--sizes", nargs="+", default=[], metavar="N", help="such as 10k 1M (default: 10k 100k 1M 10M)")
    bench.add_argument(
        "--indexes",
        nargs="+",
        default=[],
        choices=["FLAT", "IVF_FLAT", "IVF_SQ8", "HNSW"],
        help="only these (default: all)",
    )
    bench.add_argument("--clients", type=int, default=4, metavar="N", help="that search at once (default: %(default)s)")
    bench.add_argument("--out", metavar="FILE", help="for the results (default: data/local/index-bench/index.json)")
    again = bench.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an earlier run, which is the default")
    again.add_argument("--restart", action="store_true", help="insert and measure these sizes anew")
    again.add_argument(
        "--redo",
        choices=["search", "build"],
        help="measure the searches, or builds and searches, again with the vectors that are inserted",
    )

    commands.add_parser("doctor", help="what works here, what does not, and the remedy")
    return top


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command and return its exit code; the learner's errors are one sentence on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    top = parser()
    options, rest = top.parse_known_args(given)
    if options.command is None:
        top.print_help()
        return 0
    if rest and options.command != "test":
        top.error("unknown arguments: " + " ".join(rest))
    try:
        if options.command == "doctor" and not bootstrap.is_ready():
            return examine_without_environment()
        python = bootstrap.ensure_environment()
        if not bootstrap.in_environment():
            return start_again(str(python), given)
        return perform(options, rest)
    except CourseError as error:
        print("error: %s" % error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped. The same command starts again where it can.", file=sys.stderr)
        return 130


def start_again(python: str, arguments: List[str]) -> int:
    """Run the same command with the environment's Python and return its exit code."""
    command = [python, "-m", "utils"] + arguments
    if os.name == "posix":  # the new process takes this one's place: signals and exit code need no passing on
        sys.stdout.flush()
        os.execve(python, command, bootstrap.course_environment())
    process = subprocess.Popen(command, env=bootstrap.course_environment())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the console sent it to the other process too, which ends in its own way
            continue


def perform(options: argparse.Namespace, rest: List[str]) -> int:
    """Run a command inside the environment."""
    bootstrap.use_course_environment()
    if options.command == "lab":
        from utils.notebooks import open_lab

        return open_lab(options.port, browser=not options.no_browser)
    if options.command == "test":
        import pytest

        if options.local_model:
            from utils.local_models.command import model_command

            model_command("fetch", "small")
            return int(pytest.main(["--local-model"] + ["--quick"] * options.quick + rest))
        # Two at a time, since much of the suite waits for servers; with arguments, in order, as one expects of -x.
        side_by_side = [] if rest else ["-n", "2"]
        return int(pytest.main(["--quick"] * options.quick + side_by_side + rest))
    if options.command == "run":
        from utils.notebooks import run_command

        return run_command(options.notebooks, everything=options.all, save=options.save)
    if options.command == "ask":
        from utils.assistant import ask_command

        return int(ask_command(options.question))
    if options.command == "eval":
        from utils.evals import eval_command

        return eval_command(options.save, options.baseline, options.questions, options.mode, options.documents)
    if options.command == "serve":
        from importlib import import_module

        return int(import_module("utils.apps." + options.app).main())
    if options.command == "model":
        from utils.local_models.command import model_command

        return model_command(options.action, options.what)
    if options.command == "milvus":
        from utils.milvus_lab.command import milvus_command

        return milvus_command(options.kind, options.folder, options.port, options.query_nodes)
    if options.command == "bench":
        from utils.index_bench.run import bench_index_command

        return bench_index_command(
            options.sizes, options.indexes, options.clients, options.out, options.redo, options.restart
        )
    from utils.doctor import main as examine

    return int(examine())


def examine_without_environment() -> int:
    """What `doctor` can say before the environment exists; it installs nothing."""
    print("Python: %s (%s)" % (platform.python_version(), sys.executable))
    print("platform: %s" % platform.platform())
    print("free disk: %.1f GB" % (shutil.disk_usage(str(bootstrap.ROOT)).free / 1e9))
    state = "not finished or out of date" if (bootstrap.ROOT / ".venv").exists() else "not set up"
    print("environment: %s; run python3 -m utils lab" % state)
    bootstrap.check_python()
    return 1


if __name__ == "__main__":
    sys.exit(main())
