import ast
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

import featherweight as fw
from featherweight import database
from featherweight.artifact import Artifact, read, write
from featherweight.cli import main
from featherweight.database import PACKAGE, SOURCES, Database, DatabaseWarning, fingerprint
from featherweight.errors import SolveError, UsageError
from featherweight.methods import (
    NM,
    Blocks,
    Gptq,
    GridSpec,
    Magnitude,
    Obq,
    Obs,
    Plain,
    Prune,
    PruneQuantize,
    Rtn,
    Solution,
    Status,
    Unstructured,
)
from featherweight.recipe import Override, Recipe
from featherweight.stats import LayerStats
from tests.nets import images, sentences, tiny, words

NETS = str(Path(__file__).with_name("nets.py"))
METHODS = [
    Rtn(GridSpec(4)),
    Gptq(GridSpec(3)),
    Obq(GridSpec(2, group=5)),
    Magnitude(Unstructured(0.5)),
    Obs(Unstructured(0.5)),
    PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(4, symmetric=True))),
]


def problem(rows: int = 4, cols: int = 6) -> tuple[torch.Tensor, LayerStats]:
    torch.manual_seed(0)
    x = torch.randn(1, cols, 50, dtype=torch.float64)
    return torch.randn(rows, cols), LayerStats(x @ x.mT / 50, x.mean(2), torch.tensor([50]))


def solved(folder: Path, method=None, w=None, stats=None) -> bool:
    """Whether the solution came from the folder."""
    default_w, default_stats = problem()
    return Database.at(folder).solve(
        method or Gptq(GridSpec(3)), default_w if w is None else w, default_stats if stats is None else stats
    )[1]


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def next_bit(t: torch.Tensor, *place: int) -> torch.Tensor:
    out = t.clone()
    out[place] = torch.nextafter(t[place], torch.tensor(float("inf"), dtype=t.dtype))
    assert (out != t).sum() == 1
    return out


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_a_warm_run_writes_the_same_bytes(method, tmp_path):
    files = []
    for name, folder, reused in (("plain", None, None), ("cold", tmp_path / "db", 0), ("warm", tmp_path / "db", 3)):
        small = fw.compress(tiny(), images(), method=method, database=folder)
        assert small.report.reused == small.report.to_dict()["reused"] == reused
        small.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] == files[2]


def test_recurrent_and_tied_weights_and_layers_without_data(tmp_path):
    for data, method in ((sentences(), Obq(GridSpec(3))), (None, Rtn(GridSpec(3)))):
        runs = [fw.compress(words(), data, method=method, database=tmp_path / "db") for _ in range(2)]
        assert [r.report.reused for r in runs] == [0, len(runs[0].report.rows)]
        assert runs[0].artifact.digest() == runs[1].artifact.digest()
        assert runs[0].report.rows == runs[1].report.rows


def test_every_number_of_a_solution_comes_back_exactly(tmp_path):
    w, stats = problem()
    stats = replace(stats, gram=stats.gram * 0 + 1)  # rank 1: takes more damping
    method = Gptq(GridSpec(3), damp=0.0)
    first, known = Database.at(tmp_path).solve(method, w, stats)
    second, again = Database.at(tmp_path).solve(method, w, stats)
    assert (known, again) == (False, True)
    assert first.status is second.status is Status.DAMPED
    assert (first.error, first.relative_error, first.info) == (second.error, second.relative_error, second.info)
    assert first.weight.meta() == second.weight.meta()
    assert all(torch.equal(t, second.weight.tensors()[n]) for n, t in first.weight.tensors().items())
    assert not second.padded
    known = {"weight", "error", "relative_error", "status", "info", "padded", "remark"}
    assert {f.name for f in fields(Solution)} == known, "a new field of Solution must be kept in the database, too"
    remarked = [Database.at(tmp_path).solve(Plain(why="because"), *problem())[0].note for _ in range(2)]
    assert remarked == ["because"] * 2
    padded = [Database.at(tmp_path).solve(Magnitude(NM(2, 5)), *problem()) for _ in range(2)]
    assert [(s.padded, known) for s, known in padded] == [(True, False), (True, True)]


def test_numbers_that_json_does_not_know(tmp_path, monkeypatch):
    w, stats = problem()
    odd = replace(Rtn(GridSpec(3)).solve(w, stats), error=float("inf"), relative_error=float("nan"))
    monkeypatch.setattr(Rtn, "solve", lambda self, w, stats: odd)
    assert not solved(tmp_path, Rtn(GridSpec(3)))
    again, known = Database.at(tmp_path).solve(Rtn(GridSpec(3)), w, stats)
    assert known
    assert again.error == float("inf")
    assert again.relative_error != again.relative_error


def test_one_changed_bit_anywhere_is_another_entry(tmp_path):
    w, stats = problem()
    share = torch.full((4,), 0.25, dtype=torch.float64)
    inputs = [
        (Gptq(GridSpec(3)), w, stats),
        (Gptq(GridSpec(3)), next_bit(w, 3, 5), stats),
        (Gptq(GridSpec(3)), w.double(), stats),
        (Gptq(GridSpec(3)), w.T.contiguous().T, stats),
        (Gptq(GridSpec(3)), w, replace(stats, gram=next_bit(stats.gram, 0, 2, 1))),
        (Gptq(GridSpec(3)), w, replace(stats, mean=next_bit(stats.mean, 0, 5))),
        (Gptq(GridSpec(3)), w, replace(stats, samples=stats.samples + 1)),
        (Gptq(GridSpec(3)), w, replace(stats, row_share=share)),
        (Gptq(GridSpec(3)), w, replace(stats, row_share=next_bit(share, 0))),
        (Gptq(GridSpec(4)), w, stats),
        (Gptq(GridSpec(3, symmetric=True)), w, stats),
        (Gptq(GridSpec(3, group=3)), w, stats),
        (Gptq(GridSpec(3), damp=0.01 + 2**-59), w, stats),
        (Gptq(GridSpec(3), act_order=False), w, stats),
        (Rtn(GridSpec(3)), w, stats),
        (Obq(GridSpec(3)), w, stats),
        (PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(3))), w, stats),
        (PruneQuantize(Obs(Unstructured(0.5), damp=0.002), Gptq(GridSpec(3))), w, stats),
        (PruneQuantize(Magnitude(Unstructured(0.5)), Gptq(GridSpec(3))), w, stats),
    ]
    assert 0.01 + 2**-59 != 0.01
    keys = [fingerprint("solution", *case) for case in inputs]
    assert len(set(keys)) == len(keys)
    assert keys == [fingerprint("solution", *case) for case in inputs]
    assert fingerprint("trace", *inputs[0]) != keys[0]
    assert not solved(tmp_path)
    assert solved(tmp_path)
    assert not any(solved(tmp_path, *case) for case in inputs[1:])


def test_every_field_counts_also_those_of_tomorrow():
    def made(name: str, value: object, fields: dict[str, type]) -> object:
        kind = dataclass(type(name, (), {"__annotations__": fields, "__module__": "featherweight.methods.new"}))
        return kind(*([value] * len(fields)))

    values = [
        made("A", 1, {"a": int}),
        made("B", 1, {"a": int}),
        made("A", 1, {"b": int}),
        made("A", 1, {"a": int, "b": int}),
    ]
    values += [
        made("A", v, {"a": object})
        for v in (True, 1.0, "1", None, (1,), ((1,),), {"a": 1}, [], -0.0, 0.0, Status.SOLVED)
    ]
    values += [made("A", torch.zeros(shape), {"a": object}) for shape in ((), (0,), (1,), (1, 1), (2,))]
    assert len({fingerprint("x", v) for v in values}) == len(values)
    assert fingerprint("x", "ab", "c") != fingerprint("x", "a", "bc")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (database, "VERSION"),
        (database, "VERSIONS"),
        (database, "CODE"),
        (torch, "__version__"),
        (database.numba, "__version__"),
        (database.np, "__version__"),
    ],
)
def test_another_version_solves_again(tmp_path, monkeypatch, where, what):
    assert not solved(tmp_path)
    monkeypatch.setattr(where, what, "9.9")
    assert not solved(tmp_path)
    assert solved(tmp_path)


def test_another_solver_solves_again(tmp_path):
    copy = tmp_path / "featherweight"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    assert database._source_digest(copy) == database.CODE
    for name in ("methods/_kernels.py", "weights/grid.py", "__init__.py", "_linalg.py"):
        text = (copy / name).read_text()
        (copy / name).write_text(text + "# changed\n")
        assert database._source_digest(copy) != database.CODE, name
        (copy / name).write_text(text)
    assert database._source_digest(copy) == database.CODE
    (copy / "methods" / "new.py").write_text("")
    assert database._source_digest(copy) != database.CODE


def test_the_sources_are_all_that_solvers_import():
    covered = {path for pattern in SOURCES for path in PACKAGE.glob(pattern)}
    found: set[Path] = set()
    todo = {PACKAGE / "methods" / "__init__.py"}
    while todo:
        path = todo.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("featherweight."):
                base = PACKAGE.parent.joinpath(*node.module.split("."))
                near = [base.with_suffix(".py"), base / "__init__.py", *(base / f"{a.name}.py" for a in node.names)]
                todo |= {p for p in near if p.is_file()} - found
    assert len(found) > 15
    assert found <= covered, sorted(found - covered)


def test_methods_from_elsewhere_are_solved_and_not_kept(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Mine:
        name = label = "mine"

        def solve(self, w, stats):
            return Rtn(GridSpec(3)).solve(w, stats)

    for _ in range(2):
        with pytest.warns(DatabaseWarning, match="Mine is not part of featherweight"):
            assert not solved(tmp_path / "db", Mine())
    assert not (tmp_path / "db").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename(path: Path) -> None:
    """Put the right entry of another layer in its place."""
    other = path.parent / "other"
    assert not solved(other, w=problem()[0] * 2)
    shutil.move(entry(other), path)
    other.rmdir()


def no_solution(path: Path) -> None:
    write(Artifact((), {"a": torch.ones(2)}, (), {"fingerprint": path.stem}), path)


def wrong_shape(path: Path) -> None:
    unit = read(path).units[0]
    other = Rtn(GridSpec(3)).solve(torch.ones(2, 2), LayerStats.white(2)).weight
    unit = replace(unit, weight=other, view=replace(unit.view, shape=(2, 2)))
    write(Artifact((unit,), {}, (), read(path).about), path)


def wrong_about(**facts) -> object:
    def spoil(path: Path) -> None:
        found = read(path)
        write(replace(found, about=found.about | facts), path)

    return spoil


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": flip,
    "text": lambda path: path.write_text("not an entry"),
    "pickle": lambda path: torch.save({"a": torch.ones(2)}, path),
    "renamed": rename,
    "no solution": no_solution,
    "wrong shape": wrong_shape,
    "a number as text": wrong_about(error="much"),
    "a number too large": wrong_about(error="0x1p9999"),
    "an unknown status": wrong_about(status="FINE"),
    "info is no object": wrong_about(info=[1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unusable_entries_are_computed_again_with_one_warning(damage, tmp_path):
    assert not solved(tmp_path)
    good = entry(tmp_path).read_bytes()
    DAMAGE[damage](entry(tmp_path))
    with pytest.warns(DatabaseWarning, match="computed again: ") as said:
        assert not solved(tmp_path)
    assert len(said) == 1
    assert str(said[0].message).isprintable()
    assert entry(tmp_path).read_bytes() == good
    assert solved(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_entries_that_are_no_files_harm_nothing(kind, tmp_path):
    assert not solved(tmp_path)
    path = entry(tmp_path)
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.warns(DatabaseWarning) as said:
        assert not solved(tmp_path)
    assert len(said) == 2  # it can neither be read nor replaced
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_link_to_nowhere_is_replaced(tmp_path):
    assert not solved(tmp_path)
    path = entry(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.warns(DatabaseWarning):
        assert not solved(tmp_path)
    assert solved(tmp_path)


def test_tensors_are_kept_bit_for_bit(tmp_path):
    store = Database.at(tmp_path / "db")
    key = fingerprint("trace", "2:4", problem())
    kept = {
        "order": torch.arange(12, dtype=torch.int16).reshape(3, 4),
        "losses": torch.rand(4, 3, dtype=torch.float64).T,
        "small": torch.rand(2, 2, 2).half(),
        "damp": torch.tensor(0.1, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    assert store.tensors(key) is None
    store.keep(key, kept, {"pattern": "2:4"})
    found = store.tensors(key)
    assert found is not None
    assert list(found) == list(kept)
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].view(torch.uint8) if tensor.ndim else found[name],
            tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor,
        )
    assert store.path(key).name == f"{key}.fw"
    assert read(store.path(key)).about == {"fingerprint": key, "meta": {"pattern": "2:4"}}
    store.keep(key, {"order": torch.zeros(1)})
    assert list(store.tensors(key) or ()) == ["order"]
    assert main(["inspect", str(store.path(key))]) == 0
    flip(store.path(key))
    with pytest.warns(DatabaseWarning, match="computed again"):
        assert store.tensors(key) is None


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    solve, calls = Gptq.solve, []

    def dies(self, w, stats):
        calls.append(w.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, w, stats)

    monkeypatch.setattr(Gptq, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), database=tmp_path / "db")
    assert len(list((tmp_path / "db").iterdir())) == 2
    small = fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), database=tmp_path / "db")
    assert small.report.reused == 2
    assert len(calls) == 4
    monkeypatch.undo()
    assert small.artifact.digest() == fw.compress(tiny(), images(), method=Gptq(GridSpec(4))).artifact.digest()


def test_failures_are_not_kept(tmp_path, monkeypatch):
    def fails(self, w, stats):
        raise SolveError("no")

    monkeypatch.setattr(Gptq, "solve", fails)
    with pytest.raises(SolveError):
        solved(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_run_reuses_the_layers_that_stay_as_they_were(tmp_path):
    first = Recipe(Gptq(GridSpec(4)), (Override("fc.*", Rtn(GridSpec(8))),))
    second = replace(first, method=Gptq(GridSpec(3)))
    assert fw.compress(tiny(), images(), recipe=first, database=tmp_path).report.reused == 0
    assert fw.compress(tiny(), images(), recipe=second, database=tmp_path).report.reused == 1
    assert fw.compress(tiny(), images(), recipe=replace(first, repair=False), database=tmp_path).report.reused == 3
    assert fw.compress(tiny(), images(seed=9), recipe=first, database=tmp_path).report.reused == 0
    for path in list(tmp_path.iterdir())[:2]:
        path.unlink()
    fw.compress(tiny(), images(), recipe=first, database=tmp_path)
    assert fw.compress(tiny(), images(), recipe=first, database=tmp_path).report.reused == 3


def test_nothing_is_kept_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(database, "write", lambda *a: pytest.fail("written"))
    assert fw.compress(tiny(), images(), method=Rtn(GridSpec(4))).report.reused is None
    assert list(tmp_path.iterdir()) == []


def test_many_at_once(tmp_path):
    w, stats = problem()

    def work(i: int) -> torch.Tensor:
        method = Gptq(GridSpec(2 + i % 3))
        return Database.at(tmp_path).solve(method, w, stats)[0].weight.dense()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(24)))
    assert len(list(tmp_path.iterdir())) == 3
    for i, dense in enumerate(found):
        assert torch.equal(dense, Gptq(GridSpec(2 + i % 3)).solve(w, stats).weight.dense())


def test_two_processes_at_once(tmp_path):
    code = (
        "import sys, torch, featherweight as fw; from tests.nets import tiny, images; torch.set_num_threads(1)\n"
        "run = lambda bits: fw.compress(tiny(), images(), method=fw.Gptq(fw.GridSpec(bits)), database=sys.argv[1])\n"
        "r = [run(bits) for bits in (3, 4, 3, 4)]\n"
        "assert [x.report.reused for x in r[2:]] == [3, 3]; print(r[0].artifact.digest(), r[1].artifact.digest())"
    )
    command = [sys.executable, "-W", "error:database", "-c", code, str(tmp_path)]
    root = Path(__file__).parents[1]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(list(tmp_path.iterdir())) == 6
    assert solved_here(tmp_path) == 3, "another process knows them"


def test_the_number_of_threads_stays_as_the_caller_chose_it():
    code = (  # numba and torch share OpenMP, and the number is part of every fingerprint
        "import torch, featherweight as fw; from tests.nets import tiny, images; torch.set_num_threads(1)\n"
        "fw.compress(tiny(), images(), method=fw.Gptq(fw.GridSpec(3))); print(torch.get_num_threads())"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "1\n"


def solved_here(folder: Path) -> int | None:
    return fw.compress(tiny(), images(), method=Gptq(GridSpec(3)), database=folder).report.reused


def test_folders_that_cannot_be_used_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("featherweight.moments.capture", lambda *a, **k: pytest.fail("the work had begun"))
    (tmp_path / "file").write_text("")
    for folder, said in (("file", "not a folder"), ("no/such/place", "does not exist"), ("file/below", "not exist")):
        with pytest.raises(UsageError, match=said):
            fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), database=tmp_path / folder)
    monkeypatch.setattr(os, "access", lambda *a: False)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UsageError, match="cannot be read and written"):
            fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), database=folder)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_costs_only_the_copy(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        small = fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), database=tmp_path)
    assert [str(w.message).split(": ")[-1] for w in said] == ["No space left on device"], "once, not for every layer"
    assert small.report.reused == 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert small.artifact.digest() == fw.compress(tiny(), images(), method=Gptq(GridSpec(4))).artifact.digest()


def test_a_folder_deleted_meanwhile_is_made_again(tmp_path, monkeypatch):
    store = Database.at(tmp_path / "db")
    w, stats = problem()
    store.solve(Rtn(GridSpec(3)), w, stats)
    shutil.rmtree(tmp_path / "db")
    assert not store.solve(Rtn(GridSpec(3)), w, stats)[1]
    assert store.solve(Rtn(GridSpec(3)), w, stats)[1]


def test_an_entry_is_small(tmp_path):
    w, stats = problem(16, 32)
    solution, _ = Database.at(tmp_path).solve(Gptq(GridSpec(4)), w, stats)
    assert entry(tmp_path).stat().st_size <= solution.weight.bits() // 8 + 1000


@pytest.mark.filterwarnings("always")
def test_the_command_line(tmp_path, capsys):
    def run(*more: object) -> tuple[int, str, str]:
        fixed = ("compress", f"{NETS}:tiny", "--data", f"{NETS}:images", "--method", "gptq", "--bits", "4")
        code = main([*fixed, "-o", str(tmp_path / "s.fw"), *map(str, more)])
        got = capsys.readouterr()
        return code, got.out, got.err

    folder = tmp_path / "db"
    code, out, err = run("--json", "--database", folder)
    assert code == 0
    assert json.loads(out)["reused"] == 0
    assert "warning" not in err
    first = (tmp_path / "s.fw").read_bytes()
    flip(sorted(folder.iterdir())[0])
    code, out, err = run("--database", folder)
    assert code == 0
    assert "2 of 3 weights came solved from the database" in out
    assert err.count("warning: database entry not usable, so computed again: ") == 1
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "s.fw").read_bytes() == first
    code, out, err = run("--database", tmp_path / "s.fw")
    assert code == 2
    assert "is not a folder" in err
    assert main(["inspect", str(sorted(folder.iterdir())[0])]) == 0


@pytest.mark.parametrize(
    "method",
    [
        lambda s: Obs(Unstructured(s)),
        lambda s: Obs(Blocks(s, 2)),
        lambda s: Prune(Unstructured(s)),
        lambda s: PruneQuantize(Obs(Unstructured(s)), Gptq(GridSpec(4))),
    ],
)
def test_another_sparsity_costs_no_new_trace(tmp_path, monkeypatch, method):
    w, stats = problem(6, 14)
    store = Database.at(tmp_path)
    store.solve(method(0.5), w, stats)
    assert len(list(tmp_path.glob("trace-*.fw"))) == 1
    monkeypatch.setattr(Obs, "trace", lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr("featherweight.methods.pruning._traced", lambda *_: pytest.fail("traced again"))
    solution, known = store.solve(method(0.7), w, stats)
    monkeypatch.undo()
    assert not known
    alone = method(0.7).solve(w, stats)
    assert all(torch.equal(t, alone.weight.tensors()[n]) for n, t in solution.weight.tensors().items())
    monkeypatch.setattr(Obs, "trace", lambda *_: pytest.fail("traced again"))
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        store.solve(method(0.7), w * 1.5, stats)
