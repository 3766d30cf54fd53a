"""lm-eval on this engine: scores are those of our own answers, and what was asked of reading and
writing is done."""

import json
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tiny import chatty, save_model

from lazyahead import LLM, LazyPrefill, Lookahead
from lazyahead.cli import run
from lazyahead.cli.evaluate import value_of, with_model
from lazyahead.errors import ConfigError, RequestError
from lazyahead.prefill.score import Window
from lazyahead.reader import samples
from lazyahead.sampling import Sampling

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of what lm-eval imports
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")

TASK = """\
task: reader_qa
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl}}
  cache_dir: {folder}/cache
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - metric: exact_match
"""
PROMPT = "The code of the red door is 417. " * 4
RULE = LazyPrefill(
    ((0.25, 0.3), (0.5, 0.1)),
    Window(4, 3),
    protect_first=1,
    protect_last=4,
    min_tokens=16,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def adapter():
    from lazyahead.integrations import register

    return register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("models") / "tiny", initializer_range=0.4)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profiles") / "hard.toml"
    RULE.save(path)
    return str(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four questions of the reader's world, as a task of lm-eval's."""
    path = tmp_path_factory.mktemp("task")
    drawn = [*samples("few_shot", 300, n=2), *samples("single_doc_qa", 300, n=2)]
    lines = [
        json.dumps({"prompt": sample.prompt, "answer": f" {sample.answer}"}) for sample in drawn
    ]
    (path / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "reader_qa.yaml").write_text(TASK.format(folder=path), encoding="utf-8")
    return path


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def test_a_task_is_scored_as_our_own_answers_are(adapter, questions):
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=str(questions), include_defaults=False
    )
    found = lm_eval.simple_evaluate(
        "lazyahead", "prefill=balanced,decode=lookahead,dtype=float32",
        tasks=["reader_qa"], task_manager=manager, batch_size=3, device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    llm = LLM(
        dtype="float32", device="cpu", prefill=LazyPrefill.preset("balanced"), decode=Lookahead()
    )
    docs = [
        json.loads(line)
        for line in (questions / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    prompts = [llm.tokenizer(doc["prompt"])["input_ids"] for doc in docs]
    ours = [llm.generate([ids], sampling=Sampling(12, stop=("\n",)))[0].text for ids in prompts]
    theirs = {
        sample["doc"]["prompt"]: sample["filtered_resps"][0]
        for sample in found["samples"]["reader_qa"]
    }
    assert theirs == {doc["prompt"]: text for doc, text in zip(docs, ours, strict=True)}
    right = [text == doc["answer"] for doc, text in zip(docs, ours, strict=True)]
    assert found["results"]["reader_qa"]["exact_match,none"] == sum(right) / len(right)
    info = found["config"]["lazyahead"]
    assert info["prefill"] == LazyPrefill.preset("balanced").to_dict()
    assert info["decode"] == Lookahead().to_dict()
    assert 0 < info["prompt_tokens_computed"] < 1
    assert info["tokens_per_step"] >= 1


def test_the_way_of_reading_is_honoured(adapter, folder, profile):
    whole, lazy = adapter(str(folder), prefill="off"), adapter(str(folder), prefill=profile)
    for model in (whole, lazy):
        model.generate_until([asked(PROMPT, {"until": [], "max_gen_toks": 8, "num_beams": 1})])
    assert whole.get_model_info()["lazyahead"]["prompt_tokens_computed"] == 1
    assert lazy.get_model_info()["lazyahead"]["prompt_tokens_computed"] < 1
    assert lazy.llm.prefill == RULE


def test_answers_end_before_what_they_are_to_end_at_alone_and_in_a_batch(adapter, folder):
    requests = [
        asked(f"{n} {PROMPT[n:]}", {"until": [], "max_gen_toks": 8 + n // 3}) for n in range(5)
    ]
    alone = adapter(str(folder)).generate_until(requests)
    assert adapter(str(folder), batch_size=4).generate_until(requests) == alone
    stop = alone[0][2:4]
    (cut,) = adapter(str(folder)).generate_until(
        [asked(requests[0].args[0], {"until": stop, "max_gen_toks": 8})]
    )
    assert cut == alone[0][: alone[0].index(stop)]


def test_drawn_answers_repeat_by_seed_and_differ_among_themselves(adapter, folder):
    drawn = asked(
        PROMPT, {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "max_gen_toks": 12}
    )
    once, twice = adapter(str(folder)).generate_until([drawn] * 2)
    assert once != twice
    assert adapter(str(folder), batch_size=2).generate_until([drawn] * 2) == [once, twice]
    assert adapter(str(folder), seed=7).generate_until([drawn]) != [once]


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"max_length": 9}, {"temperature": -1, "do_sample": True}]
)
def test_generation_settings_that_cannot_be_honoured_are_refused_by_name(adapter, folder, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        adapter(str(folder)).generate_until([asked(PROMPT, settings)])


@pytest.mark.parametrize(
    "arguments",
    [{"parallelize": True}, {"batch_size": "auto"}, {"prefill": "quick"}, {"decode": "yes"}],
)
def test_model_arguments_that_mean_nothing_are_refused_by_name(adapter, folder, arguments):
    with pytest.raises(ConfigError, match=f"{next(iter(arguments))}|preset"):
        adapter(str(folder), **arguments)


def plain(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = llm.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    chosen = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return float(chosen.sum()), logits.argmax(-1).tolist() == continuation


def test_likelihoods_are_the_plain_models_when_everything_is_read(adapter, folder, tmp_path):
    LazyPrefill(schedule=((0.5, 1.0),), min_tokens=0).save(tmp_path / "all.toml")
    for prefill in ("off", str(tmp_path / "all.toml")):
        model = adapter(str(folder), prefill=prefill, dtype="float32", batch_size=2)
        requests = [
            asked(PROMPT, " red"),
            asked("", "door"),
            asked(f"{PROMPT} ", "417."),
            asked(" ", "417"),
        ]
        found = model.loglikelihood(requests, disable_tqdm=True)
        pairs = [
            model._encode_pair(PROMPT, " red"),
            ([model.prefix_token_id], model.tok_encode("door")),
        ]
        pairs += [
            model._encode_pair(PROMPT, " 417."),
            ([model.prefix_token_id], model.tok_encode(" 417")),
        ]
        for (value, greedy), pair in zip(found, pairs, strict=True):
            assert value == pytest.approx(plain(model.llm, *pair)[0], rel=1e-4)
            assert greedy == plain(model.llm, *pair)[1]


def test_what_was_written_after_reading_lazily_is_likeliest_when_read_that_way(
    adapter, folder, profile
):
    model = adapter(str(folder), prefill=profile, dtype="float32", batch_size=2)
    context = model.tok_encode(PROMPT)
    (written,) = model.llm.generate([context], sampling=Sampling(6))
    other = [*written.token_ids[:-1], (written.token_ids[-1] + 1) % 300]
    pairs = [(("", ""), context, list(tokens)) for tokens in (written.token_ids, other)]
    (value, greedy), (less, is_greedy) = model._loglikelihood_tokens(pairs)
    assert greedy
    assert not is_greedy
    assert less < value
    assert value != pytest.approx(plain(model.llm, context, list(written.token_ids))[0], rel=1e-3)


def test_the_likelihood_of_a_whole_text_is_the_plain_models_and_needs_nothing_deferred(
    adapter, folder
):
    model = adapter(str(folder), prefill="off", dtype="float32", max_length=40)
    (short, long) = model.loglikelihood_rolling(
        [asked("The code"), asked(PROMPT)], disable_tqdm=True
    )
    assert short == pytest.approx(
        plain(model.llm, [model.prefix_token_id], model.tok_encode("The code"))[0], rel=1e-4
    )
    assert long < short
    with pytest.raises(ConfigError, match="prefill=off"):
        adapter(str(folder)).loglikelihood_rolling([asked("The code")])


def test_long_contexts_keep_their_end(adapter, folder, caplog):
    model = adapter(str(folder), max_length=32)
    (text,) = model.generate_until([asked(PROMPT, {"max_gen_toks": 4})])
    assert "cut to its last 28" in caplog.text
    cut = model.tok_encode(PROMPT)[-28:]
    assert text == model.llm.generate([cut], sampling=Sampling(4))[0].text
    with pytest.raises(ConfigError, match="no room"):
        model.generate_until([asked(PROMPT, {"max_gen_toks": 32})])


def test_chats_go_through_the_template_and_get_no_second_start(adapter, folder):
    model = adapter(str(folder))
    chat = [{"role": "user", "content": "What?"}]
    with pytest.raises(ConfigError, match="apply_chat_template"):
        model.apply_chat_template(chat)
    model.tokenizer = chatty(model.tokenizer)
    assert model.apply_chat_template(chat) == "<|user|>\nWhat?</s>\n<|assistant|>\n"
    model.tokenizer.bos_token = "<s>"
    assert model.tok_encode("<s>What?").count(model.prefix_token_id) == 1


def test_the_command_passes_on_what_it_is_given(adapter, folder, questions, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    tasks = import_module("lm_eval.tasks")  # thousands of its own, which take seconds to list
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    options = [
        "--tasks",
        "reader_qa",
        "--include_path",
        str(questions),
        "--limit",
        "1",
        "--device",
        "cpu",
    ]
    assert (
        run(["eval", *options, "--model_args", f"pretrained={folder},prefill=off", "--json"]) == 0
    )
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values.keys() >= {"lazyahead", "machine", "model", "config", "seed", "runs", "results"}
    assert values["model"] == str(folder)
    assert values["config"]["prefill"] is None
    assert values["results"]["reader_qa"]["sample_len"] == 1
    assert run(["eval", *options, "--model_args", f"pretrained={folder},prefil=off"]) == 2
    assert "prefil:" in capsys.readouterr().err


def test_the_model_is_named_unless_it_was():
    assert with_model(["--tasks", "a"]) == ["--tasks", "a", "--model", "lazyahead"]
    assert with_model(["run", "--model", "lazyahead"]) == ["run", "--model", "lazyahead"]
    assert with_model(["ls", "tasks"]) == ["ls", "tasks"]
    assert value_of(["-o=here", "--model", "x"], "-o") == "here"
    for wrong in ([], ["--model", "hf"], ["-M=hf"]):
        with pytest.raises(RequestError):
            with_model(wrong)
