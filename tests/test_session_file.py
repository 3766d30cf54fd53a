"""Sessions on disk: what is read back is what was saved, and whatever is wrong is refused in one
line, before anything is allocated."""

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import (
    CALM,
    KEEP_ALL,
    LAZY,
    PREFILLS,
    ByHand,
    check_invariants,
    engine_for,
    finish,
    prompts,
    request_for,
    tiny,
)

from lazyahead import LLM, Sampling
from lazyahead.cache.session_check import checksum
from lazyahead.cache.session_file import load_session, save_session
from lazyahead.errors import SessionFileError

DOCUMENT, SECOND = prompts(60, 9)
SHORT = Sampling(max_new_tokens=8)


def llm(prefill=KEEP_ALL, decode=None, family="llama", **options):
    return LLM(tiny(family)[0], prefill=prefill, decode=decode, **options)


def ask(model, text, session=None, sampling=SHORT):
    """The last piece of a stream: its statistics are those of the whole."""
    pieces = list(model.stream(text, sampling=sampling, session=session))
    return [token for piece in pieces for token in piece.token_ids], pieces[-1].stats


def rewrite(path, change, fits=True):
    """Changes tensors and header of a file; with `fits`, so that the checksum agrees again."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors, header)
    if fits:
        header["checksum"] = checksum(header, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, header)


def refused(model, path, message=""):
    """Loading fails at once, in one line."""
    model.shortest_session()
    begin = time.perf_counter()
    with pytest.raises(SessionFileError, match=message) as error:
        model.load_session(path)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - begin < 0.5  # milliseconds, on a machine that others use too


@pytest.fixture
def saved(tmp_path):
    model = llm(LAZY)
    session = model.session()
    ask(model, DOCUMENT, session)
    model.save_session(session, tmp_path / "session")
    return model, session, tmp_path / "session"


@pytest.mark.parametrize("name", ["none", "keep_all", "lazy", "paper", "random_drop"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_a_session_read_back_goes_on_as_the_one_in_memory(tmp_path, name, family):
    model = llm(PREFILLS[name], family=family)
    session = model.session()
    ask(model, DOCUMENT, session)
    model.save_session(session, tmp_path / "a")
    again = model.load_session(tmp_path / "a")
    check_invariants(again)
    assert again.history == session.history
    assert again.kept_by_layer == session.kept_by_layer
    assert model.reach(again) == model.reach(session)
    text = [*session.history, *SECOND]
    assert ask(model, text, again)[0] == ask(model, text, session)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_read_back_is_revived_as_by_hand(tmp_path):
    engine, model = engine_for("llama", LAZY), tiny("llama")[0]
    session, hand = engine.new_session(), ByHand("llama")
    finish(engine, [request_for(engine, DOCUMENT, 5, session)], lambda: hand.follow(session))
    save_session(session, tmp_path / "a", model, LAZY)
    again = load_session(
        tmp_path / "a", model, LAZY, engine.new_session(), LLM(model, prefill=LAZY).shortest_session
    )
    before = again.num_revived
    finish(
        engine,
        [request_for(engine, [*again.history, *SECOND], 9, again)],
        lambda: hand.follow(again),
    )
    assert again.num_revived > before
    assert hand.num_checked == sum(len(kv) for kv in again.kv)


def test_a_session_of_another_model_or_schedule_is_refused(saved):
    _, _, path = saved
    with pytest.raises(SessionFileError, match="another model"):
        llm(LAZY, family="gemma2").load_session(path)
    other = families.FAMILIES["llama"]()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.5)
    with pytest.raises(SessionFileError, match="another model"):
        LLM(other, prefill=LAZY).load_session(path)
    with pytest.raises(SessionFileError, match="other settings"):
        llm(CALM).load_session(path)
    with pytest.raises(SessionFileError, match="other settings"):
        llm(None).load_session(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(saved, share):
    model, _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SessionFileError, match="damaged"):
        model.load_session(path)


def test_what_is_no_session_is_refused(saved, tmp_path):
    model = saved[0]
    (tmp_path / "text").write_text("hello, this is some text and no session at all")
    save_file({"a": torch.zeros(3)}, tmp_path / "tensors")
    for name, message in (
        ("text", "damaged"),
        ("tensors", "no lazyahead session"),
        ("none", "no session at"),
    ):
        with pytest.raises(SessionFileError, match=message):
            model.load_session(tmp_path / name)
    with pytest.raises(SessionFileError):
        model.load_session(tmp_path)


@pytest.mark.parametrize("name", ["kv.3.keys", "kv.0.positions", "stash"])
def test_a_missing_part_is_refused(saved, name):
    model, _, path = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors[next(part for part in tensors if part.startswith(name))]
    save_file(tensors, path, header)
    with pytest.raises(SessionFileError, match="damaged"):
        model.load_session(path)


def test_nothing_half_written_is_left_and_the_old_file_stays(saved, monkeypatch):
    model, session, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lazyahead.cache.session_file.os.replace", full)
        with pytest.raises(SessionFileError, match="No space left"):
            model.save_session(session, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(SessionFileError, match="cannot write"):
        model.save_session(session, path.parent / "no" / "such" / "folder")
    with pytest.raises(SessionFileError, match="holds nothing"):
        model.save_session(model.session(), path)


def changed(name, change):
    """A change of one tensor of a file."""

    def apply(tensors, header):
        key = next(key for key in tensors if key.startswith(name))
        tensors[key] = change(tensors[key])

    return apply


def put(index, value):
    """A tensor with one place set anew."""

    def apply(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return apply


CHANGES = {
    "more rows than positions": changed("kv.1.keys", lambda t: t.expand(9, -1, -1, -1)),
    "longer keys": changed("kv.1.keys", lambda t: torch.cat([t, t], 2)),
    "fewer values": changed("kv.1.values", lambda t: t[:, :, 1:]),
    "another dtype": changed("kv.0.keys", torch.Tensor.double),
    "bits of another dtype": changed("kv.0.keys", lambda t: t.view(torch.int32)),
    "more heads": changed("kv.0.keys", lambda t: t.repeat(1, 2, 1, 1)),
    "smaller heads": changed("kv.0.values", lambda t: t[..., :-1]),
    "another rank": changed("kv.0.keys", lambda t: t[0]),
    "rank 0": changed("kv.0.keys", lambda t: torch.tensor(1.0)),
    "no number": changed("kv.2.keys", put(3, torch.nan)),
    "infinite": changed("kv.2.values", put(3, torch.inf)),
    "a position twice": changed("kv.0.positions", put(0, 1)),
    "a position behind the text": changed("kv.0.positions", put(0, 10**6)),
    "a position before the text": changed("kv.0.positions", put(0, -1)),
    "positions as floats": changed("kv.0.positions", torch.Tensor.float),
    "a slot out of range": changed("stash.1.slots", put(0, 10**6)),
    "a slot before all": changed("stash.1.slots", put(0, -1)),
    "a slot of another token": changed("stash.1.slots", lambda t: t.flip(0)),
    "wider states": changed("stash.1.hidden", lambda t: torch.cat([t, t], 1)),
    "a state twice": changed("stash.1.positions", put(0, 2)),
    "half a state": changed("stash.1.hidden", lambda t: t[1:]),
    "a token that is none": changed("token_ids", put(0, 10**6)),
    "a token below 0": changed("pending", put(0, -1)),
    "a text that is longer": changed("token_ids", lambda t: torch.cat([t, t])),
    "no text": changed("token_ids", lambda t: t[:0]),
    "a short table": changed("table.0", lambda t: t[:3]),
    "a table of another width": changed("table.0", lambda t: t[..., :-1]),
    "one more layer": lambda tensors, _: tensors.update({"kv.4.keys": tensors["kv.3.keys"] + 0}),
    "one more table": lambda tensors, _: tensors.update({"table.9": tensors["table.0"] + 0}),
    "a stash where none can be": lambda tensors, _: tensors.update(
        {"stash.3.hidden": torch.zeros(1, 64)}
    ),
    "a prompt longer than the text": lambda _, header: header.update(prompt_len="1000"),
    "a prompt below 0": lambda _, header: header.update(prompt_len="-1"),
    "a prompt of no number": lambda _, header: header.update(prompt_len="x"),
    "a prompt of half a token": lambda _, header: header.update(prompt_len="1.5"),
    "lengths of too few layers": lambda _, header: header.update(prefill_lens="[1]"),
    "lengths beyond the layers": lambda _, header: header.update(prefill_lens="[9e9]"),
    "lengths of no numbers": lambda _, header: header.update(prefill_lens='{"a": 1}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_states_that_do_not_fit_the_model_or_each_other_are_refused(saved, change):
    model, _, path = saved
    rewrite(path, change)
    refused(model, path, "damaged")


def test_a_change_that_only_the_checksum_can_see_is_refused(saved):
    model, _, path = saved
    rewrite(path, changed("kv.2.keys", put(3, 0.123)), fits=False)
    refused(model, path, "checksum")
    rewrite(path, lambda tensors, header: header.pop("checksum", None), fits=False)
    refused(model, path, "checksum")


def test_a_session_of_a_model_with_other_layers_is_refused(saved):
    other = families.FAMILIES["llama"]()
    other.load_state_dict(tiny("llama")[0].state_dict())
    assert LLM(other, prefill=LAZY).load_session(saved[2]).history == saved[1].history
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.add_(0.5)
    refused(LLM(other, prefill=LAZY), saved[2], "other weights")


@pytest.mark.parametrize(
    "settings_", [{"revive": "never"}, {"local_window": 3}, {"protect_last": 5}], ids=str
)
def test_a_session_that_was_read_by_other_settings_is_refused(saved, settings_):
    refused(llm(replace(LAZY, **settings_)), saved[2], "other settings")


def test_a_file_of_an_earlier_version_is_refused_with_its_remedy(saved):
    model, _, path = saved
    rewrite(path, lambda _, header: header.update(format="lazyahead-session-1"))
    refused(model, path, "earlier version.*read its document again")


@cache
def original():
    """A model, a session, and its file's bytes."""
    model = llm(LAZY)
    session = model.session()
    ask(model, DOCUMENT, session)
    with TemporaryDirectory() as folder:
        model.save_session(session, Path(folder) / "session")
        return model, session, (Path(folder) / "session").read_bytes()


def _is_same(left, right):
    return (
        left.history == right.history
        and left.prefill_lens == right.prefill_lens
        and left.prompt_len == right.prompt_len
        and all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(left.kv, right.kv, strict=True)
        )
    )


def _try(data):
    """The session of these bytes; None where they are refused."""
    model = original()[0]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        path.write_bytes(data)
        try:
            return model.load_session(path)
        except SessionFileError as error:
            assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
            return None


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_is_refused_or_says_the_same(data):
    """Half of the flips hit the header, which is the smaller part."""
    raw = bytearray(original()[2])
    header_len = 8 + int.from_bytes(raw[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
    place = data.draw(st.integers(0, header_len) | st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del raw[place : place + data.draw(st.integers(1, len(raw)))]
    elif kind == "insert":
        raw[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        other = data.draw(st.integers(0, len(raw) - 1))
        raw[place], raw[other] = raw[other], raw[place]
    session = _try(bytes(raw))
    assert session is None or _is_same(session, original()[1])


NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 70)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_header_with_any_field_changed_is_refused_or_says_the_same(data):
    raw = original()[2]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(sorted(header[name])))
    value = data.draw(
        NUMBERS | st.text(max_size=5) | st.none() | st.lists(NUMBERS, max_size=4) | st.booleans()
    )
    header[name][field] = value
    changed_header = json.dumps(header).encode()
    session = _try(len(changed_header).to_bytes(8, "little") + changed_header + raw[8 + length :])
    assert session is None or _is_same(session, original()[1])


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_places_that_are_changed_and_summed_anew_are_refused_or_lose_no_token(data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        path.write_bytes(original()[2])

        def change(tensors, header):
            names = [name for name, tensor in tensors.items() if tensor.dtype == torch.int64]
            tensor = tensors[data.draw(st.sampled_from(sorted(names)))]
            for _ in range(data.draw(st.integers(1, 2))):
                tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(NUMBERS)

        rewrite(path, change)
        try:
            session = original()[0].load_session(path)
        except SessionFileError:
            return
        check_invariants(session)
