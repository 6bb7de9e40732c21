"""`examples/speed.py` and `examples/peers.py` run and count right. No test asserts a time."""

from __future__ import annotations

import csv
import itertools

import peers
import pytest
import speed
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from freqkv import PRESETS
from freqkv.models.upstream import CACHE

SMALL = [
    "--shape", "small", "--window", "64", "--rounds", "1", "--tokens", "4", "--lengths", "2", "3",
    "--transforms", "61", "64", "--batches", "1", "3", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes of their own take seconds to start."""
    monkeypatch.setattr(speed, "in_a_process", lambda worker, *args: worker(*args))


def rows_of(command, tmp_path, *more):
    speed.main([command, *SMALL, *more, "--output", str(tmp_path)])
    (file,) = tmp_path.glob("*.csv")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows
    assert all(row["hardware"] and row["torch"] and row["commit"] for row in rows)
    return rows


def arms(rows, **selected):
    return {row["arm"] for row in rows if all(row[name] == value for name, value in selected.items())}


def test_decode(tmp_path):
    rows = rows_of("decode", tmp_path)
    for what in ("full window", "nothing cached", "2N tokens before", "3N tokens before"):
        assert arms(rows, what=what) == {"DynamicCache", "FreqKV"}
    assert {row["entries"] for row in rows if row["what"] == "3N tokens before"} == {"192", "35..64"}
    assert all(0 < float(row["compression_share"]) < 1 for row in rows if row["windows"] and row["arm"] == "FreqKV")
    assert list(tmp_path.glob("*.png"))


def test_prefill(tmp_path):
    rows = rows_of("prefill", tmp_path)
    assert arms(rows, tokens="192") == {"plain, N tokens", "FreqKV", "plain, T tokens"}
    assert all(0 < float(row["compression_share"]) < 1 for row in rows if row["arm"] == "FreqKV")


def test_presets(tmp_path):
    rows = rows_of("presets", tmp_path)
    for what in ("prompt, s", "token, ms"):
        found = arms(rows, what=what, windows="3")
        assert found == {"DynamicCache", "sinks + most recent, gamma = 0.5", *(f"preset {name}" for name in PRESETS)}
    assert {row["rounds"] for row in rows} == {"1"}  # so that a ratio is that of the medians
    medians = {(row["windows"], row["what"], row["arm"]): float(row["median"]) for row in rows}
    for (windows, what, arm), row in zip(medians, rows, strict=True):
        expected = medians[windows, what, arm] / medians[windows, what, "preset streaming"]
        assert float(row["to_streaming"]) == pytest.approx(expected, rel=1e-3)


def test_transform(tmp_path):
    """Each way is compared with scipy in float64 before it is timed."""
    rows = rows_of("transform", tmp_path)
    assert len(arms(rows, n="61")) == 5


def test_batch(tmp_path):
    rows = rows_of("batch", tmp_path)
    for size in ("1", "3"):
        assert arms(rows, batch=size) == {"DynamicCache", "FreqKV"}


def test_ragged(tmp_path):
    rows = rows_of("ragged", tmp_path)
    expected = {
        f"{c}, {rows}" for c in ("FreqKV", "DynamicCache") for rows in ("equal rows", "rows of N/4 to 2.75N tokens")
    }
    assert arms(rows, batch="3") == expected
    assert arms(rows, batch="1") == set()


def test_memory(tmp_path, in_this_process):
    """Bytes are checked against 2 x layers x entries x heads x head size x bytes by the script itself."""
    rows = rows_of("memory", tmp_path, "--lengths", "3")
    held = {(row["arm"], row["windows"]): int(row["cache_bytes"]) for row in rows if row["cache_bytes"]}
    token = 2 * 2 * 2 * 8 * 4
    assert held == {("FreqKV", "3"): token * 64, ("DynamicCache", "3"): token * 193}
    assert all(float(row["peak_mb"]) * 1e6 > int(row["cache_bytes"]) for row in rows if row["cache_bytes"])


def test_profile(tmp_path):
    rows = rows_of("profile", tmp_path)
    assert arms(rows, what="a prompt of 2 windows") == {"DynamicCache, 2 prompts of N", "FreqKV"}
    assert arms(rows, what="a token of 3 rows") == {"FreqKV, equal rows", "FreqKV, rows of N/4 to 2.75N tokens"}
    for what in ("a token, nothing cached", "a token, full window"):
        products = []
        for arm in ("DynamicCache", "FreqKV"):
            told = {row["operators"]: row for row in rows if (row["arm"], row["what"]) == (arm, what)}
            products.append(float(told["matrix products"]["calls"]))
            assert sum(float(row["share"]) for row in told.values()) == pytest.approx(2, abs=1e-3)
        assert products[0] == products[1] >= 2 * 7 + 1  # of each layer, and the output matrix: the cache adds none


def test_compile(tmp_path):
    rows = rows_of("compile", tmp_path)
    assert {row["graphs_compiled_while_timed"] for row in rows} == {"0"}
    assert len(rows) == 4
    assert sum(row["outside_the_graph_us"] != "" for row in rows) == 1


def test_training(tmp_path, in_this_process):
    rows = rows_of("training", tmp_path, "--lengths", "3")
    assert len(arms(rows, windows="3")) == 4


@pytest.mark.slow
def test_peaks_are_those_of_a_process_of_its_own():
    args = speed.parse_arguments(["memory", *SMALL])
    hundred = speed.in_a_process(hold, args, 100 * 2**20)
    nothing = speed.in_a_process(hold, args, 0)
    assert 90 * 2**20 <= hundred["peak"] - nothing["peak"] <= 110 * 2**20


def hold(args, size):
    held = torch.ones(size, dtype=torch.uint8)
    return {"peak": speed.peak(args), "held": len(held)}


def test_what_is_timed_again_is_the_same_work(monkeypatch):
    """By a clock that goes on by one each time it is read: twice for a token, which so takes one."""
    readings = itertools.count()
    monkeypatch.setattr(speed, "clock", lambda device: float(next(readings)))
    args = speed.parse_arguments(["decode", *SMALL])
    model = speed.patched_model(args)
    plain = speed.dynamic(args, model, 60)
    ours = speed.FreqKVCache(model.config, window=64)
    model(speed.text(args, 60), **{CACHE: ours})
    times = speed.again_and_again(model, {"plain": plain, "ours": ours}, speed.text(args, 4), 2, "")
    assert times == {"plain": [1.0] * 8, "ours": [1.0] * 8}
    assert plain.get_seq_length() == ours.tokens_seen == 60


def test_peers(tmp_path, shipped):
    arguments = ["--documents", "2", "--tokens", "3", "--window", "64", "--lengths", "0.5", "2", "--facts", "0"]
    peers.main([*arguments, "--runs", str(tmp_path), "--output", str(tmp_path / "peers.csv")])
    with (tmp_path / "peers.csv").open() as file:
        rows = {(row["arm"], row["prompt"]): row for row in csv.DictReader(file)}
    ours, plain = rows["FreqKV, R = 0", "32"], rows["DynamicCache", "32"]
    assert ours["bits_per_byte"] == plain["bits_per_byte"], "nothing is compressed yet"
    assert rows["FreqKV, R = 0", "128"]["bits_per_byte"] != rows["DynamicCache", "128"]["bits_per_byte"]
    assert rows["FreqKV, R = 0", "128"]["cache_bytes"] == ours["cache_bytes"]
    config = AutoModelForCausalLM.from_pretrained(shipped).config
    size = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    assert int(plain["cache_bytes"]) == size * 35
    assert int(ours["cache_bytes"]) == size * 64
    assert int(rows["DynamicCache", "128"]["cache_bytes"]) == size * 131
    assert peers.cache_bytes(DynamicCache(config=config)) == 0


def test_peers_are_asked_the_same_questions(tmp_path):
    arguments = ["--documents", "1", "--tokens", "3", "--window", "256", "--lengths", "0.75", "2", "--facts", "1"]
    peers.main([*arguments, "--runs", str(tmp_path), "--output", str(tmp_path / "peers.csv")])
    with (tmp_path / "peers_recall.csv").open() as file:
        found = {(row["arm"], row["length"]): int(row["found"]) for row in csv.DictReader(file)}
    assert len(found) >= 12
    assert all(count == 8 for (_, length), count in found.items() if length == "0.75")
    assert found["DynamicCache", "2.0"] == found["StaticCache", "2.0"] == 8
    assert found["sinks + most recent", "2.0"] < 8


def test_presses_need_their_package(tmp_path):
    with pytest.raises(SystemExit, match="kvpress in an environment of its own"):
        peers.main(["--presses", "--runs", str(tmp_path), "--output", str(tmp_path / "peers.csv")])
