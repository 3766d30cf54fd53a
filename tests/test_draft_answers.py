"""The log of answers survives what happens to files."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyahead.draft.answers import AnswerLog, Usage
from lazyahead.errors import MemoryFileError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "answers.db"


def log_at(path, model="reader", tokenizer="abc", **options):
    return AnswerLog(path, model=model, tokenizer=tokenizer, **options)


def test_answers_come_back_oldest_first_in_another_process_life(path):
    answers = [[1, 2, 3], [0], [2**32 - 1, 5]]
    with log_at(path) as log:
        for answer in answers:
            log.append(answer)
        log.append([])
    with log_at(path) as log:
        assert list(log.answers()) == answers
        assert [record.num_tokens for record in log.records()] == [3, 1, 2]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), max_size=5))
def test_any_token_ids_survive(tmp_path_factory, answers):
    with log_at(tmp_path_factory.mktemp("log") / "answers.db") as log:
        for answer in answers:
            log.append(answer)
        assert list(log.answers()) == answers


@pytest.mark.parametrize("tokens", [[-1], [2**32], [1.5], ["a"]])
def test_what_is_no_token_id_is_refused(path, tokens):
    with log_at(path) as log, pytest.raises(ValueError, match="token ids"):
        log.append(tokens)


def test_namespaces_are_apart(path):
    with log_at(path) as log:
        log.append([1], "a")
        log.append([2], "b")
        log.append([3, 4], "a")
        assert list(log.answers("a")) == [[1], [3, 4]]
        assert list(log.answers("none")) == []
        assert log.usage() == {"a": Usage(2, 3), "b": Usage(1, 1)}
        assert log.clear("a") == 2
        assert log.usage() == {"b": Usage(1, 1)}
        assert [record.namespace for record in log.records()] == ["b"]
        assert log.clear() == 1
        assert log.usage() == {}


def test_the_oldest_answers_of_the_namespace_leave_at_the_capacity(path):
    with log_at(path, capacity_bytes=40) as log:
        log.append([7], "other")
        for i in range(20):
            log.append([i, i, i])
        assert list(log.answers()) == [[17] * 3, [18] * 3, [19] * 3]
        assert list(log.answers("other")) == [[7]]
        log.append(range(100))
        assert list(log.answers()) == [list(range(90, 100))]


def test_cleared_answers_are_gone_from_the_disk(path):
    secret = [0x5EC4E7] * 50
    blob = b"\xe7\xc4\x5e\x00" * 50
    with log_at(path) as log:
        log.append(secret)
    assert blob in path.read_bytes()
    with log_at(path) as log:
        log.clear()
    assert not any(blob in file.read_bytes() for file in path.parent.iterdir())


def test_only_the_owner_may_read_it(path):
    with log_at(path) as log:
        log.append([1])
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


@pytest.mark.parametrize("other", [{"model": "gpt"}, {"tokenizer": "xyz"}])
def test_a_log_of_another_model_or_tokenizer_is_refused_by_name(path, other):
    log_at(path).close()
    name, value = next(iter(other.items()))
    with pytest.raises(MemoryFileError, match=f"{name} .*not '{value}'"):
        log_at(path, **other)


@pytest.mark.parametrize(
    "content",
    [b"no database at all, but long enough to be one" * 100, b"SQLite format 3\0" + b"\xff" * 5000],
)
def test_a_file_that_is_no_log_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(MemoryFileError, match="answers"):
        log_at(path)
    assert path.read_bytes() == content


def test_the_database_of_another_program_is_refused_and_left_alone(path):
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(MemoryFileError, match="no answers log"):
        log_at(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    db.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MemoryFileError, match="cannot open"):
        log_at(tmp_path / "file" / "answers.db")


def test_a_damaged_record_is_named(path):
    log = log_at(path)
    log.append([1, 2, 3])
    log._db.execute("UPDATE answers SET tokens = x'0102'")
    with pytest.raises(MemoryFileError, match="record 1"):
        list(log.answers())
    log.close()


def test_import_adds_the_answers_of_another_log(path, tmp_path):
    with log_at(tmp_path / "old.db") as old:
        old.append([1, 2], "a")
        old.append([3], "b")
    with log_at(path) as log:
        log.append([9], "a")
        assert log.import_from(tmp_path / "old.db") == 2
        assert list(log.answers("a")) == [[9], [1, 2]]
        with pytest.raises(MemoryFileError, match="itself"):
            log.import_from(path)
        with pytest.raises(MemoryFileError, match="no answers log at"):
            log.import_from(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


def test_threads_may_write_and_read_at_once(path):
    with log_at(path) as log:

        def write(k):
            for i in range(30):
                log.append([k, i])
                list(log.answers())

        threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = list(log.answers())
    assert sorted(answers) == [[k, i] for k in range(4) for i in range(30)]
    assert all([i for j, i in answers if j == k] == list(range(30)) for k in range(4))


def test_two_logs_on_one_file_see_each_other(path):
    with log_at(path) as one, log_at(path) as two:
        one.append([1])
        two.append([2])
        assert list(one.answers()) == list(two.answers()) == [[1], [2]]


WRITER = """
import sys
from lazyahead.draft.answers import AnswerLog
log = AnswerLog(sys.argv[1], model="reader", tokenizer="abc")
i = 0
while True:
    log.append([i] * 500)
    print(i, flush=True)
    i += 1
"""


def test_a_process_killed_while_writing_loses_at_most_the_answer_being_written(path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 50:
            break
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split()
    writer.stdout.close()
    writer.wait()
    last_reported = int(rest[-1]) if rest else 50
    with log_at(path) as log:
        answers = list(log.answers())
        assert answers == [[i] * 500 for i in range(len(answers))]
        assert last_reported < len(answers) <= last_reported + 2
        log.append([7])
