"""`bench prefix`: a row for each length, with its baseline, and answers compared."""

import json

import pytest

from lazyahead.cli import run


@pytest.mark.parametrize(("prefill", "num_cached"), [("off", (256, 384)), ("balanced", (256, 256))])
def test_a_row_for_each_length_compares_cache_and_fresh_reads(
    capsys: pytest.CaptureFixture[str], prefill: str, num_cached: tuple[int, ...]
) -> None:
    options = ["--lengths", "400,300", "--questions", "2", "--runs", "1", "--max-new-tokens", "3"]
    assert run(["bench", "prefix", *options, "--prefill", prefill, "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values.keys() >= {"lazyahead", "machine", "model", "config", "seed", "runs"}
    assert [row["length"] for row in values["rows"]] == [300, 400]
    for row, cached in zip(values["rows"], num_cached, strict=True):
        assert (row["num"], row["identical"]) == (2, 1.0)
        assert row["cached_tokens"] == cached
        assert row["speedup"] == pytest.approx(row["ttft_s"] / row["cached_ttft_s"])
        assert row["baseline_speedup"] == pytest.approx(
            row["baseline_ttft_s"] / row["cached_ttft_s"]
        )


def test_without_runs_transformers_is_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "300", "--questions", "1", "--runs", "0", "--max-new-tokens", "2"]
    assert run(["bench", "prefix", *options]) == 0
    assert "–" in capsys.readouterr().out
