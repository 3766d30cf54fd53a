"""`lazyahead memory`: what goes in comes out, and mistakes get one line."""

import json

import pytest
import torch
from tiny import byte_level, save_model

from lazyahead import LLM, Lookahead, Sampling
from lazyahead.cli import run
from lazyahead.draft.answers import AnswerLog

COMMON = {"lazyahead", "machine", "model", "config", "seed", "runs"}
ANSWER = "The code of the red door is 417."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def file(tmp_path) -> str:
    return str(tmp_path / "answers.db")


@pytest.fixture
def last_json(capsys):
    def call(*arguments: str) -> dict:
        assert run(["memory", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(capsys):
    def call(*arguments: str) -> str:
        assert run(["memory", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in lines if line.startswith("lazyahead: ")]) == 1
        return lines[-1]

    return call


def held(file: str, namespace: str = "default") -> list[str]:
    with AnswerLog(file) as log:
        return [byte_level().decode(tokens) for tokens in log.answers(namespace)]


def test_import_list_and_clear_make_a_round_trip(model, file, tmp_path, last_json):
    lines = [{"text": ANSWER}, {"prompt": "Which code?", "answer": ANSWER}, {"tokens": [5, 6, 7]}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "a.txt").write_text(ANSWER * 2)
    values = last_json(
        "import",
        str(tmp_path / "lines.jsonl"),
        str(tmp_path / "a.txt"),
        "-f",
        file,
        "-m",
        model,
        "--namespace",
        "x",
    )
    assert values.keys() >= COMMON | {"files", "sequences", "tokens"}
    assert (values["files"], values["sequences"]) == (2, 4)
    assert held(file, "x")[0] == ANSWER
    assert held(file, "x")[1] == ANSWER + "</s>"  # nothing of its prompt
    assert held(file, "x")[3] == ANSWER * 2
    listed = last_json("list", "-f", file)
    assert listed.keys() >= COMMON
    (row,) = listed["namespaces"]
    assert (row["namespace"], row["answers"], row["tokens"]) == ("x", 4, values["tokens"])
    assert last_json("list", "-f", file, "--namespace", "y")["namespaces"] == []
    assert last_json("clear", "-f", file)["cleared"] == 4
    assert last_json("list", "-f", file)["namespaces"] == []


def test_what_is_imported_is_drafted_from(model, file, tmp_path, capsys):
    sampling = Sampling(max_new_tokens=32, ignore_eos=True)
    config = Lookahead(memory=file, namespace="docs")
    first = LLM(model, prefill=None, decode=None).generate(ANSWER, sampling=sampling)
    (tmp_path / "answers.jsonl").write_text(json.dumps({"tokens": list(first.token_ids)}))
    assert (
        run(
            [
                "memory",
                "import",
                str(tmp_path / "answers.jsonl"),
                "-f",
                file,
                "-m",
                model,
                "--namespace",
                "docs",
            ]
        )
        == 0
    )
    assert "1 texts of" in capsys.readouterr().out
    again = LLM(model, prefill=None, decode=config).generate(ANSWER, sampling=sampling)
    assert again.token_ids == first.token_ids
    assert again.stats.num_steps < first.stats.num_steps


def test_a_folder_brings_its_texts_and_leaves_out_the_rest(
    model, file, tmp_path, last_json, capsys
):
    folder = tmp_path / "docs"
    (folder / ".git").mkdir(parents=True)
    (folder / "deep").mkdir()
    (folder / "a.md").write_text("first")
    (folder / "deep" / "b.py").write_text("second")
    (folder / "c.bin").write_bytes(b"\x00")
    (folder / ".git" / "d.txt").write_text("hidden")
    (folder / "e.txt").write_bytes(b"caf\xe9")
    assert last_json("import", str(folder), "-f", file, "-m", model)["sequences"] == 2
    assert held(file) == ["first", "second"]


def test_a_namespace_is_cleared_and_the_others_stay(model, file, tmp_path, last_json, refused):
    (tmp_path / "a.txt").write_text(ANSWER)
    for namespace in ("a", "b"):
        last_json(
            "import", str(tmp_path / "a.txt"), "-f", file, "-m", model, "--namespace", namespace
        )
    assert last_json("clear", "-f", file, "--namespace", "a")["cleared"] == 1
    assert held(file, "a") == []
    assert held(file, "b") == [ANSWER]
    assert "'nobody'" in refused("clear", "-f", file, "--namespace", "nobody")


def test_tables_are_for_people(model, file, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(ANSWER)
    for arguments in (
        ["import", str(tmp_path / "a.txt"), "-f", file, "-m", model],
        ["list", "-f", file],
    ):
        assert run(["memory", *arguments]) == 0
    assert "default" in capsys.readouterr().out
    assert run(["memory", "clear", "-f", file]) == 0
    assert "1 answers deleted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('{"tokens": [1, 99999]}', "tokens"),
        ('{"tokens": [true]}', "tokens"),
        ('{"answer": "a"}', "prompt"),
        ("[1]", "object"),
        ("{", "JSON"),
        ("", "empty"),
        (r'{"text": "half \ud83d"}', "'text' has half a character"),
        (r'{"prompt": "\udc80", "answer": "a"}', "'prompt' has half a character"),
        (r'{"text": "a", "more": {"turns": ["\ud83d"]}}', "'more' has half a character"),
        ("[" * 9000, "JSON"),
    ],
)
def test_a_line_that_means_nothing_is_refused_by_number(
    model, file, tmp_path, refused, line, names
):
    path = tmp_path / "lines.jsonl"
    path.write_text(line)
    said = refused("import", str(path), "-f", file, "-m", model)
    assert names in said
    assert "lines.jsonl" in said


def test_what_is_not_there_or_no_memory_is_refused(model, file, tmp_path, refused):
    assert "answers.db" in refused("list", "-f", file)
    assert "answers.db" in refused("clear", "-f", file)
    assert "no-such" in refused("import", str(tmp_path / "no-such"), "-f", file, "-m", model)
    assert "no texts" in refused("import", str(tmp_path), "-f", file, "-m", model)
    (tmp_path / "a.txt").write_text(ANSWER)
    (tmp_path / "other.db").write_bytes(b"something else" * 200)
    assert "other.db" in refused(
        "import", str(tmp_path / "a.txt"), "-f", str(tmp_path / "other.db"), "-m", model
    )
    assert "capacity_bytes" in refused(
        "import", str(tmp_path / "a.txt"), "-f", file, "-m", model, "--capacity-bytes", "100"
    )


def test_generate_takes_a_memory_only_where_it_drafts(tmp_path) -> None:
    from lazyahead.cli.options import parse_decode
    from lazyahead.errors import ConfigError

    decode = parse_decode(None, tmp_path / "answers.db", "team-a")
    assert decode is not None
    assert (decode.memory, decode.namespace) == (str(tmp_path / "answers.db"), "team-a")
    with pytest.raises(ConfigError, match=r"answers\.db"):
        parse_decode("off", tmp_path / "answers.db")
    with pytest.raises(ConfigError, match="team-a"):
        parse_decode("lookahead", None, "team-a")
