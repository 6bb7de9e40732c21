"""Tables of results: what is written is read again, by a run that goes on and by many processes as by one."""

from __future__ import annotations

import csv
import json
import subprocess
import threading
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import freqkv
from freqkv.evaluation import Records, environment, text_digest
from freqkv.evaluation import records as module

KEYS, VALUES = ("window", "method"), ("score", "reply")
SETTINGS = {"model": "tiny", "seed": 3, "windows": [64, 128], "share": 0.1, "chat": None}
ODD = [
    "plain",
    "a,b",
    'say "this"',
    '"',
    "two\nlines",
    "a\r\nb",
    "a\rb",
    "",
    " spaces ",
    "größe 中文 🙂",
    "x\n",
    "\n",
    ",,",
    "'",
]


@dataclass
class State:
    """What `Records` asks of accelerate's PartialState, for processes that are threads."""

    process_index: int = 0
    num_processes: int = 1
    barrier: threading.Barrier | None = None
    waited: list[int] = field(default_factory=list)

    @property
    def is_main_process(self):
        return self.process_index == 0

    def wait_for_everyone(self):
        self.waited.append(1)
        if self.barrier is not None:
            self.barrier.wait(20)


def new(path, keys=KEYS, values=VALUES, settings=SETTINGS, state=None, **options):
    return Records(path, keys, values, settings, state=state or State(), **options)


def row(window, method="full", score=0.5, reply="yes"):
    return {"window": window, "method": method, "score": score, "reply": reply}


def as_text(rows):
    return [{name: str(value) for name, value in each.items()} for each in rows]


def by_csv(path):
    """The file as Python's own reader has it."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "recall.csv"


def test_values_come_back(path):
    rows = [row(64, "full", 0.1 + 0.2, "yes"), row(128, "full", 1e-9, "no"), row(64, "freqkv", None, 7)]
    records = new(path)
    records.add(rows[:2])
    records.add(iter(rows[2:]))
    assert by_csv(path) == as_text(rows), "rows are there before the end"
    told = records.finish()
    assert told == by_csv(path)
    assert sorted(map(str, told)) == sorted(map(str, as_text(rows)))
    assert [(r["window"], r["method"]) for r in told] == [("64", "freqkv"), ("64", "full"), ("128", "full")]
    assert float(told[1]["score"]) == 0.1 + 0.2, "not one bit is lost"
    assert path.read_bytes().startswith(b"window,method,score,reply\n")
    assert sorted(p.name for p in path.parent.iterdir()) == ["recall.csv", "recall.json"]


@pytest.mark.parametrize("reply", ODD)
@pytest.mark.parametrize("last", [True, False])
def test_any_reply_comes_back(path, reply, last):
    values = ("score", "reply") if last else ("reply", "score")
    rows = [row(64, reply=reply), row(128, reply=reply)]
    records = new(path, values=values)
    records.add(rows)
    assert by_csv(path) == as_text(rows)
    assert new(path, values=values).finish() == records.finish() == as_text(rows)


TEXT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # csv of Python 3.10 reads no NUL


@given(rows=st.lists(st.tuples(st.integers(), st.text(TEXT, max_size=8), st.text(TEXT, max_size=12)), max_size=6))
def test_any_table_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("records") / "a.csv"
    records = new(path)
    records.add(row(window, method, 1, reply) for window, method, reply in rows)
    last = {(str(w), m): as_text([row(w, m, 1, reply)])[0] for w, m, reply in rows}
    told = records.finish()
    assert {(r["window"], r["method"]): r for r in told} == last
    assert len(told) == len(last)
    assert new(path).finish() == told


def test_a_long_reply_comes_back(path):
    records = new(path)
    records.add([row(64, reply="x" * 140_000)])
    assert records.finish() == as_text([row(64, reply="x" * 140_000)])


def test_keys_sort_as_numbers_where_they_are(path):
    records = new(path, ("window",), ("score",))
    records.add({"window": w, "score": 1} for w in (128, "b", 64, 9, "a", 0.5, 1000))
    assert [r["window"] for r in records.finish()] == ["0.5", "9", "64", "128", "1000", "a", "b"]


def test_a_later_row_of_the_same_keys_counts(path):
    records = new(path)
    records.add([row(64, score=1), row(128), row(64, score=2)])
    records.add([row(64, score=3)])
    assert records.finish() == as_text([row(64, score=3), row(128)])
    again = new(path)
    again.add([row(64, score=4)])
    assert again.finish() == as_text([row(64, score=4), row(128)])


def test_a_run_that_goes_on_skips_rows(path):
    wanted, made = [(w, m) for w in (64, 128, 256) for m in ("full", "freqkv")], []
    for most in (2, 3, 10):  # killed after so many
        records = new(path)
        for window, method in wanted:
            if {"window": window, "method": method} in records:
                continue
            if most == 0:
                break
            most -= 1
            made.append((window, method))
            records.add([row(window, method)])
            assert row(window, method, score="other") in records, "more columns will do"
            assert {"window": str(window), "method": method} in records
    assert made == wanted
    assert len(records.finish()) == 6
    assert {"window": 63, "method": "full"} not in records


@pytest.mark.parametrize("values", [("score", "reply"), ("reply", "score")])
@pytest.mark.parametrize(
    "reply", ["yes", "a, b", 'a "b"', "größe 中 🙂", "two\nlines", "two\r\nlines", "two\rlines", "x\n", ""]
)
def test_a_last_line_that_was_cut(tmp_path, reply, values):
    """At any byte: it is dropped, the rows before it are kept, and the run goes on."""
    whole = tmp_path / "whole.csv"
    records = new(whole, values=values)
    records.add([row(64, reply="x\ny"), row(128, reply="z")])
    before = whole.stat().st_size
    records.add([row(256, "long", 0.25, reply)])
    content, about = whole.read_bytes(), whole.with_suffix(".json").read_text()
    wrong = []
    for end in range(before, len(content)):
        path = tmp_path / f"{end}.csv"
        path.write_bytes(content[:end])
        path.with_suffix(".json").write_text(about)
        try:
            again = new(path, values=values)
        except Exception as error:
            wrong.append((content[before:end], repr(error)[:60]))
            continue
        if {"window": 256, "method": "long"} in again:
            wrong.append((content[before:end], "kept"))
        again.add([row(256, "long", 0.25, reply)])
        assert again.finish() == as_text([row(64, reply="x\ny"), row(128, reply="z"), row(256, "long", 0.25, reply)])
    assert not wrong


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**SETTINGS, "seed": 4}, r"\(seed\)"),
        ({**SETTINGS, "seed": 4, "windows": [64]}, r"\(seed, windows\)"),
        ({k: v for k, v in SETTINGS.items() if k != "model"}, r"\(model\)"),
        ({**SETTINGS, "more": 1}, r"\(more\)"),
        ({k: v for k, v in SETTINGS.items() if k != "chat"}, r"\(chat\)"),
    ],
)
def test_other_settings_are_refused_by_name(path, other, named):
    new(path).add([row(64)])
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(ValueError, match=f"other settings {named}"):
        new(path, settings=other)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
    assert row(64) in new(path, settings=dict(reversed(SETTINGS.items()))), "their order does not matter"


def test_settings_are_what_json_makes_of_them(path):
    new(path, settings={"sizes": (1, 2), "by": {1: "a"}}).add([row(64)])
    records = new(path, settings={"sizes": [1, 2], "by": {"1": "a"}})
    assert row(64) in records
    assert records.settings == {"sizes": [1, 2], "by": {"1": "a"}}


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (("window",), VALUES),
        (("window", "methods"), VALUES),
        (KEYS, ("reply", "score")),
        (KEYS, (*VALUES, "more")),
        (("method", "window"), VALUES),
    ],
)
def test_other_columns_are_refused(path, rows, keys, values):
    new(path).add(row(n) for n in range(rows))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"other columns than {', '.join((*keys, *values))}"):
        new(path, keys, values)
    assert path.read_bytes() == before


def test_a_file_of_someone_else(path):
    path.parent.mkdir()
    path.write_text("window,method,score,reply\n64,full,1,yes\n")
    with pytest.raises(ValueError, match=r"has no recall\.json beside it"):
        new(path)
    assert path.read_text().endswith("64,full,1,yes\n")


@pytest.mark.parametrize(
    "wrong", [{"window": 1}, {**row(1), "more": 2}, {"window": 1, "method": 2, "score": 3, "answer": 4}, {}]
)
def test_rows_of_other_columns_are_refused(path, wrong):
    records = new(path)
    with pytest.raises(ValueError, match="a row has the columns window, method, score, reply"):
        records.add([row(64), wrong])
    assert records.finish() == [], "none of them is written"


def test_the_order_of_a_row_does_not_matter(path):
    records = new(path)
    records.add([dict(reversed(row(64).items()))])
    assert records.finish() == as_text([row(64)])


# Runs and what they were made with


def test_what_a_run_was_made_with(path):
    new(path).add([row(64)])
    new(path).finish()  # it makes no row, and is not told
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["settings"] == SETTINGS
    assert about["runs"] == [environment()]
    assert about["runs"][0]["torch"] == torch.__version__
    assert about["runs"][0]["transformers"] == transformers.__version__
    assert about["runs"][0]["freqkv"] == freqkv.__version__
    assert about["runs"][0]["threads"] == str(torch.get_num_threads())
    assert all(about["runs"][0].values())


def test_runs_of_other_versions_are_told(path, monkeypatch):
    new(path).add([row(63)])
    new(path).add([row(64)])
    monkeypatch.setattr(module, "__version__", "9.9")
    new(path).add([row(65)])
    runs = json.loads(path.with_suffix(".json").read_text())["runs"]
    assert [run["freqkv"] for run in runs] == [freqkv.__version__, "9.9"]


def test_the_commit(tmp_path, path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert "commit" not in environment()
    assert environment(tmp_path)["commit"] == "unknown"
    assert environment(tmp_path / "nowhere")["commit"] == "unknown"
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert environment(tmp_path)["commit"] == commit[:12]
    (tmp_path / "file").write_text("b")
    assert environment(tmp_path)["commit"] == commit[:12] + "-dirty"
    new(path, repository=tmp_path).add([row(64)])
    assert json.loads(path.with_suffix(".json").read_text())["runs"] == [environment(tmp_path)]


def test_digests():
    assert text_digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert text_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert text_digest("größe") != text_digest("grosse")


# Processes


UNITS = [(window, method) for window in (64, 128, 9, 256, 1000) for method in ("full", "freqkv", "recent")]


def work(path, state, most=None):
    """What a script does; a run that is killed after `most` units of its own does not finish."""
    records = new(path, state=state)
    done = 0
    for window, method in records.share(UNITS):
        if {"window": window, "method": method} in records:
            continue
        if done == most:
            return None
        done += 1
        records.add([row(window, method, window / 3, f"{method}\n{window}")])
    return records.finish()


def together(path, processes, most=None):
    """Threads instead of processes; what each of them returns."""
    barrier, returned, errors = threading.Barrier(processes), [None] * processes, []

    def run(index):
        try:
            returned[index] = work(path, State(index, processes, barrier), most)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    return returned


@pytest.mark.parametrize("processes", [2, 3, 7, 20])
def test_processes_write_what_one_writes(tmp_path, processes):
    alone = work(tmp_path / "alone.csv", State())
    assert len(alone) == len(UNITS)
    returned = together(tmp_path / "many.csv", processes)
    assert returned == [alone] * processes
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.csv", "alone.json", "many.csv", "many.json"]


@pytest.mark.parametrize("then", [1, 2, 4])
def test_killed_processes_lose_nothing(tmp_path, then):
    """Rows beside the file are taken in by the next run, whatever its number of processes."""
    path = tmp_path / "a.csv"
    assert together(path, 3, most=2) == [None] * 3
    parts = sorted(tmp_path.glob("*.part"))
    assert [p.name for p in parts] == ["a.csv.1.part", "a.csv.2.part"]
    parts[0].write_bytes(parts[0].read_bytes()[:-7])  # cut while it was written
    parts[1].write_bytes(b"window,met")
    records = new(path, state=State())
    assert not list(tmp_path.glob("*.part"))
    kept = [unit for unit in UNITS if dict(zip(KEYS, unit, strict=True)) in records]
    assert kept == [unit for i, unit in enumerate(UNITS) if i in (0, 3, 1)]
    assert together(path, then) == [work(tmp_path / "alone.csv", State())] * then


def test_only_the_main_process_draws(path):
    barrier = threading.Barrier(1)
    assert new(path, state=State(0, 3, barrier)).is_main
    other = new(path, state=State(2, 3, barrier))
    assert not other.is_main
    assert other.share(range(10)) == [2, 5, 8]
    other.add([row(64)])
    assert path.read_text() == "window,method,score,reply\n", "which does not write into its file"
    assert by_csv(path.with_name("recall.csv.2.part")) == as_text([row(64)])


def test_tables_beside_each_other(tmp_path):
    one, other = tmp_path / "recall.csv", tmp_path / "recall.long.csv"
    new(other)
    new(other, state=State(1, 2)).add([row(64)])
    new(one)
    assert new(other).finish() == as_text([row(64)])


def test_a_name_with_brackets(tmp_path):
    path = tmp_path / "recall[1].csv"
    new(path)
    new(path, state=State(1, 2)).add([row(64)])
    assert new(path).finish() == as_text([row(64)])


def test_rows_that_come_after_the_end(tmp_path):
    """A table may be finished several times."""
    path = tmp_path / "a.csv"
    main, other = new(path), new(path, state=State(1, 2))
    other.add([row(64)])
    assert main.finish() == as_text([row(64)])
    other.add([row(128)])
    main.add([row(9)])
    assert main.finish() == other.finish() == as_text([row(9), row(64), row(128)])


def test_accelerate_is_asked_by_default(path):
    records = Records(path, KEYS, VALUES, SETTINGS)
    assert records.is_main
    assert records.share([1, 2]) == [1, 2]
    records.add([row(64)])
    assert records.finish() == as_text([row(64)])
