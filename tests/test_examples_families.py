"""The table of families in examples/results/README.md, the file that it is made from, and the library."""

from __future__ import annotations

import every_family
import families as script
import pytest
import zoo

import freqkv
from freqkv.models.upstream import TESTED

ROWS = script.read(script.RESULTS / "families.csv")
HERE = {row["family"]: row for row in ROWS if script.VERSION in row["transformers"].split()}
SERVED = ["cohere2", "deepseek_v2", "falcon_h1", "gemma4_text", "llama", "nanochat", "smollm3", "zamba2"]
REFUSED = ["bert", "blt", "deepseek_v32", "gpt2", "mamba", "moshi", "xlnet"]

listed = pytest.mark.skipif(not HERE, reason=f"the table was not made with transformers {script.VERSION}")


def test_the_results_show_the_table():
    results = (script.RESULTS / "README.md").read_text()
    assert script.updated(results, ROWS) == results
    assert script.updated(results, ROWS[1:]) != results


def test_the_readme_counts_the_same():
    assert script.count(ROWS) in " ".join((script.ROOT / "README.md").read_text().split())


def test_the_table_holds_the_oldest_and_the_newest_version():
    versions = {version for row in ROWS for version in row["transformers"].split()}
    assert versions == set(TESTED)
    for version in versions:
        names = [row["family"] for row in ROWS if version in row["transformers"].split()]
        assert len(names) == len(set(names))


@listed
def test_every_entry_of_the_mapping_has_a_row():
    assert set(HERE) == set(zoo.families())
    refused = {family for family, row in HERE.items() if row["status"] == script.REFUSED}
    assert refused == set(HERE) & set(every_family.REASON) - set(zoo.NOT_BUILT)


@listed
@pytest.mark.parametrize("family", SERVED + REFUSED)
def test_the_library_agrees(family):
    row, model = HERE[family], zoo.tiny_model(family)
    support = freqkv.supported(model)
    assert bool(support) == (family in SERVED) == (row["status"] == script.SERVED)
    if not support:
        assert row["reason"] == script.in_short(support.reason)
        return
    assert row["layers"] == script.layers_in_words(model, support.analysis)
    cache = script.check(family, "eager", model)
    assert row["rotation"] == script.rotation_in_words(support.analysis, cache)


def test_a_version_replaces_its_own_rows_and_those_that_are_not_tested():
    def row(family, layers, versions):
        return dict.fromkeys(script.COLUMNS, "") | {"family": family, "layers": layers, "transformers": versions}

    here, other = script.VERSION, next(version for version in TESTED if version != script.VERSION)
    both = " ".join(script.by_number([here, other]))
    before = [
        row("one", "all", f"4.0 {both}"),
        row("three", "all", here),
        row("two", "all", both),
        row("two", "", "4.0"),
    ]
    found = [row("one", "all", here), row("two", "none", here)]
    after = [row("one", "all", both), row("two", "all", other), row("two", "none", here)]
    assert script.merged(before, found) == after
    assert script.merged(after, found) == after
