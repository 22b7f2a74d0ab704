"""The house: which room may import which, what is pure, what is forbidden everywhere, and how long things get.

All of it is read from the source with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "common": {"common"},
    "ps": {"ps", "common"},
    "worker": {"worker", "common"},
    "deploy": {"deploy", "ps", "worker", "common"},
    "bench": {"bench", "deploy", "ps", "worker", "common"},
}
"""What each room may import: `deploy, bench -> ps, worker -> common` (DESIGN, section 3)."""

DOORS = {"deploy/bench_cli.py": {"bench"}}
"""Files that may import more: `datps bench` is a command like the others."""

GENERATED = ("common/wire/v1/ps_pb2.py", "common/wire/v1/ps_pb2.pyi")

FOREIGN_WEIGHTS = "worker/pretrained.py"
"""May use `torch.load(..., weights_only=True)`, for files that the user names (DESIGN, section 8)."""

PURE_PATTERNS = (
    "common/config.py",
    "common/*_spec.py",
    "common/section.py",
    "common/spec_sources.py",
    "common/layout.py",
    "common/errors.py",
    "common/codecs/*.py",
    "ps/rounds.py",
    "ps/membership.py",
    "ps/reduce.py",
    "worker/session.py",
    "worker/attacks.py",
    "worker/objectives.py",
    "worker/smoothing.py",
    "worker/curriculum.py",
    "worker/replays.py",
    "worker/overfitting.py",
    "worker/schedules.py",
    "worker/metrics.py",
    "worker/selection.py",
    "worker/validation.py",
    "worker/evaluation.py",
    "worker/certification.py",
    "worker/judging/requests.py",
    "worker/judging/restarts.py",
    "worker/judging/verdicts.py",
    "worker/randomness.py",
    "worker/data.py",
    "worker/subsets.py",
    "worker/transfer.py",
    "worker/published.py",
    "worker/models/preact.py",
    "worker/models/fixed_norm.py",
    "worker/models/enlarge.py",
    "worker/optimizers/*.py",
    "deploy/supervision.py",
    "deploy/progress.py",
    "bench/theory/problem.py",
    "bench/theory/bound.py",
    "bench/theory/algorithm.py",
    "bench/theory/points.py",
    "bench/theory/sweeps.py",
    "bench/theory/fit.py",
)
"""Modules without I/O, clock, global random state, threads, environment or logging; all they import of ours is pure."""

IMPURE_MODULES = {
    *("os", "io", "sys", "pathlib", "shutil", "tempfile", "glob", "fcntl", "mmap", "fileinput"),
    *("socket", "ssl", "select", "selectors", "http", "urllib", "requests", "grpc", "subprocess", "signal"),
    *("time", "datetime", "sched"),
    *("random", "secrets", "uuid"),
    *("threading", "_thread", "multiprocessing", "concurrent", "asyncio", "queue", "contextvars", "atexit"),
    *("logging", "warnings", "syslog"),
    *("pickle", "marshal", "shelve", "dbm", "importlib", "ctypes"),
    *("safetensors", "torchvision", "sklearn", "rich", "typer"),
}
IMPURE_CALLS = {"open", "print", "input", "breakpoint", "eval", "exec", "compile", "__import__"}
GLOBAL_RANDOMNESS = {
    *("numpy.random", "torch.random", "torch.manual_seed", "torch.seed", "torch.initial_seed"),
    *("torch.set_rng_state", "torch.get_rng_state", "torch.cuda", "torch.default_generator"),
}
TAKES_A_GENERATOR = {
    *("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "poisson"),
    *("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
}
"""Functions of torch that draw from the global state unless they are given a generator."""

FILE_LINES = 450
FUNCTION_LINES = 60


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules_of(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if name_of(path) not in GENERATED]


PRODUCT = [path for room in ROOMS for path in modules_of(room)]
PURE = sorted({path for pattern in PURE_PATTERNS for path in ROOT.glob(pattern)})
Check = Callable[[Path], list[str]]
"""What is wrong with a file, each finding with the file's name."""
CHECKS: dict[str, Check] = {}
"""By the name of the test that makes it of all files."""


def of_all(paths: Sequence[Path]) -> Callable[[Check], Callable[[], None]]:
    """Makes a test of a check: it shows the findings of all files, and there must be none."""

    def decorate(check: Check) -> Callable[[], None]:
        CHECKS[check.__name__] = check

        def test() -> None:
            assert [finding for path in paths for finding in check(path)] == []

        return test

    return decorate


every_file, every_pure_file = of_all(PRODUCT), of_all(PURE)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; for `from a import b` that is `a.b`."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *base.split(".")])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}".strip(".")


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every name used, the first part as it was imported: `np.random` is `numpy.random`."""
    aliases: dict[str, str] = {}
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes_of(path):
        if isinstance(node, (ast.Attribute, ast.Name)):
            dotted = dotted_name(node)
            if dotted:
                first, *rest = dotted.split(".")
                yield node.lineno, ".".join([aliases.get(first, first), *rest])


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain that starts at a name; else empty."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted_name(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def calls_in(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """Line, last part of the name, and node of every call; a method of an expression counts by its own name."""
    for node in nodes_of(path):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                yield node.lineno, function.attr, node
            elif isinstance(function, ast.Name):
                yield node.lineno, function.id, node


# Imports


def test_rooms_hold_the_files_that_this_test_reads() -> None:
    assert {"common", "ps", "worker", "deploy"} <= {path.relative_to(ROOT).parts[0] for path in PRODUCT}
    assert len(PRODUCT) > 40
    for pattern in PURE_PATTERNS:
        assert list(ROOT.glob(pattern)), pattern


@every_file
def test_imports_point_one_way(path: Path) -> list[str]:
    room = path.relative_to(ROOT).parts[0]
    return [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] in {*ROOMS, "tests", "proto"} - ROOMS[room] - DOORS.get(name_of(path), set())
    ]


def test_no_module_of_ours_is_called_proto() -> None:
    assert not (ROOT / "proto" / "__init__.py").exists()


# Purity


@every_pure_file
def test_pure_module_imports_no_input_output_clock_thread_or_random_state(path: Path) -> list[str]:
    return [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] in IMPURE_MODULES
    ]


@every_pure_file
def test_pure_module_imports_only_pure_modules_of_ours(path: Path) -> list[str]:
    pure = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in PURE}
    pure |= {"common", "ps", "worker"}
    pure |= {"common.codecs.cpu", *(f"common.codecs.cpu.{file.stem}" for file in ROOT.glob("common/codecs/cpu/*.py"))}
    return [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] in ROOMS and name not in pure and name.rpartition(".")[0] not in pure
    ]


@every_pure_file
def test_pure_module_calls_no_input_or_output(path: Path) -> list[str]:
    return [
        f"{name_of(path)}:{line} calls {name}"
        for line, name, call in calls_in(path)
        if isinstance(call.func, ast.Name) and name in IMPURE_CALLS
    ]


@every_pure_file
def test_pure_module_leaves_the_global_random_state_alone(path: Path) -> list[str]:
    wrong = [
        f"{name_of(path)}:{line} uses {name}"
        for line, name in [*names_in(path), *imports_of(path)]
        if any(name == forbidden or name.startswith(f"{forbidden}.") for forbidden in GLOBAL_RANDOMNESS)
    ]
    wrong += [
        f"{name_of(path)}:{line} calls {name} without a generator"
        for line, name, call in calls_in(path)
        if name in TAKES_A_GENERATOR and not any(keyword.arg == "generator" for keyword in call.keywords)
    ]
    return wrong


@every_pure_file
def test_pure_module_keeps_no_state_in_globals(path: Path) -> list[str]:
    return [f"{name_of(path)}:{node.lineno}" for node in nodes_of(path) if isinstance(node, ast.Global)]


# Forbidden everywhere


def _takes_weights_only(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
    return isinstance(given, ast.Constant) and given.value is True


@every_file
def test_nothing_is_evaluated_or_unpickled(path: Path) -> list[str]:
    builtins = [
        f"{name_of(path)}:{line} calls {name}"
        for line, name, call in calls_in(path)
        if isinstance(call.func, ast.Name) and name in {"eval", "exec", "compile", "__import__"}
    ]
    pickles = [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    ]
    forbidden = {"torch.load", "torch.hub", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    loads = [f"{name_of(path)}:{line} uses {name}" for line, name in names_in(path) if name in forbidden]
    if name_of(path) == FOREIGN_WEIGHTS:
        loads = [text for text in loads if not text.endswith("torch.load")]
        loads += [f"{line}" for line, name, call in calls_in(path) if name == "load" and not _takes_weights_only(call)]
    return builtins + pickles + loads


@every_file
def test_nothing_asks_for_a_shell(path: Path) -> list[str]:
    wrong = [
        f"{name_of(path)}:{line}"
        for line, _, call in calls_in(path)
        for keyword in call.keywords
        if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    wrong += [f"{name_of(path)}:{line}" for line, name in names_in(path) if name in {"os.system", "os.popen"}]
    return wrong


# Size


@every_file
def test_file_has_one_subject_and_says_so_in_its_first_line(path: Path) -> list[str]:
    text = path.read_text()
    return [name_of(path)] if text and not (ast.get_docstring(tree_of(path)) or "").strip() else []


@every_file
def test_file_is_not_too_long(path: Path) -> list[str]:
    lines = len(path.read_text().splitlines())
    return [f"{name_of(path)} has {lines} lines"] if lines > FILE_LINES else []


@every_file
def test_functions_are_not_too_long(path: Path) -> list[str]:
    functions = (n for n in nodes_of(path) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    return [f"{name_of(path)}: {name} has {lines} lines" for name, lines in lengths.items() if lines > FUNCTION_LINES]


# Generated code


def test_generated_code_is_current(tmp_path: Path) -> None:
    python = ROOT / ".venv-proto" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no generator: `make proto` makes .venv-proto")
    command = [str(python), "-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}"]
    command += [f"--pyi_out={tmp_path}", "proto/common/wire/v1/ps.proto"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for name in GENERATED:
        assert (ROOT / name).read_bytes() == (tmp_path / name).read_bytes(), name


# These checks see what they look for


def findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> list[str]:
    """Names of the checks that refuse a pure module of this source."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "common" / "sample.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    monkeypatch.setattr(f"{__name__}.PURE", [])
    return [name for name, check in CHECKS.items() if check(path)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ps.rounds import Rounds", "imports_point_one_way"),
        ("def f():\n    import worker.session", "imports_point_one_way"),
        ("import os", "imports_no_input_output"),
        ("from time import monotonic", "imports_no_input_output"),
        ("from concurrent.futures import ThreadPoolExecutor", "imports_no_input_output"),
        ("from common.events import Emitter", "imports_only_pure"),
        ("print(3)", "calls_no_input"),
        ("import numpy as np\nx = np.random.default_rng()", "global_random_state"),
        ("from numpy import random", "global_random_state"),
        ("from torch import manual_seed as m\nm(3)", "global_random_state"),
        ("import torch\ntorch.rand(3)", "global_random_state"),
        ("import torch\ntorch.empty(3).uniform_(0, 1)", "global_random_state"),
        ("def f():\n    global x\n    x = 3", "no_state_in_globals"),
        ("eval('3')", "evaluated_or_unpickled"),
        ("import torch as t\nt.load('x')", "evaluated_or_unpickled"),
        ("from torch import load\nload('x')", "evaluated_or_unpickled"),
        ("import pickle", "evaluated_or_unpickled"),
        ("run('x', shell=True)", "asks_for_a_shell"),
        ("x = 3", "says_so_in_its_first_line"),
        ("x = 3\n" * 451, "file_is_not_too_long"),
        ("def f():\n" + "    x = 3\n" * 60, "functions_are_not_too_long"),
    ],
)
def test_checks_of_this_file_refuse_what_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    assert any(expected in name for name in findings(tmp_path, monkeypatch, source))


def test_checks_of_this_file_let_a_pure_module_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""Sums."""\nimport torch\nfrom common import errors\nx = torch.rand(3, generator=torch.Generator())\n'
    assert findings(tmp_path, monkeypatch, source) == []
