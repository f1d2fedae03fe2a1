"""`hotshoe baseline` from files to a verdict: over HTTP against a real server, and on the reference path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from adapters.bases import BaseModel, load_base
from adapters.errors import BaseMismatch, ConfigInvalid, DataInvalid, EngineUnavailable, HotshoeError, OutputExists
from server.cli.main import build_app
from tests.fixtures.adapters import write_adapter
from tests.fixtures.service import Server, running
from tests.training.conftest import chat, write_jsonl
from tests.training.test_baseline_parts import words
from training.baseline.ledger import LEDGER_FILE
from training.baseline.report import summary
from training.baseline.rivals import TITLES
from training.baseline.verdict import CANNOT_TELL, NOT_WORTH_IT, WORTH_IT
from training.data.formats import read_data

LABELS = ("noun", "verb")


class Desk:
    """A folder with the three sets, a report and a ledger, and the command that reads them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base

    @property
    def report(self) -> Path:
        return self.folder / "baseline.json"

    def put(self, **rows: Sequence[Any]) -> None:
        for name, value in rows.items():
            write_jsonl(self.folder / f"{name}.jsonl", list(value))

    def run(self, *options: object, validation: str = "validation", names_ledger: bool = True) -> Result:
        files = [self.folder / "training.jsonl", "--validation", self.folder / f"{validation}.jsonl"]
        fixed = ["--base", self.base, "--report", self.report]
        ledger = ["--ledger", self.folder / "home" / "readings.jsonl"] if names_ledger else []
        words = ["baseline", *files, *fixed, *ledger, *options]
        return CliRunner().invoke(build_app(), [str(word) for word in words])

    def judge(self, *options: object, names_ledger: bool = True) -> Result:
        return self.run("--test", self.folder / "test.jsonl", *options, names_ledger=names_ledger)

    def made(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.report.read_text())
        return made


def refused(result: Result) -> HotshoeError:
    assert isinstance(result.exception, HotshoeError), result.output
    return result.exception


def labelled(seed: int, count: int) -> list[Any]:
    """A word whose end says what it is."""
    return [
        chat(f"{name}{('ation', 'ify')[at % 2]}", LABELS[at % 2], system=None)
        for at, name in enumerate(words(seed, count))
    ]


def heard(by: str, seed: int, count: int) -> list[Any]:
    """What the scripted engine answers in this model's name."""
    return [chat(name, f"{by} heard: {name}", system=None) for name in words(seed, count)]


@pytest.fixture
def desk(tmp_path: Path, qwen2_base: Path) -> Desk:
    return Desk(tmp_path, qwen2_base)


# Over HTTP


@pytest.fixture(scope="module")
def server(qwen2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(load_base(qwen2_base), tmp_path_factory.mktemp("server")) as server:
        server.pushed("router")
        server.pushed("router")
        yield server


@pytest.fixture
def served(desk: Desk, server: Server) -> Desk:
    """Rows that version 1 answers exactly, and nobody else."""
    desk.put(training=heard("router@1", 1, 30), validation=heard("router@1", 2, 8), test=heard("router@1", 3, 60))
    return desk


def test_an_adapter_that_beats_the_best_prompt_is_worth_it_with_its_cost_and_the_reading_counted(
    served: Desk, server: Server
) -> None:
    result = served.judge("--adapter", "router@1", "--url", server.url, "--metric", "exact_match", "--examples", "2")
    assert result.exit_code == 0, result.output
    assert "worth it: router@1 is worth it against the best prompt (as the rows are)" in result.output
    made = served.made()
    verdict = made["verdict"]
    assert (verdict["verdict"], verdict["judged"]["difference"], verdict["judged"]["clusters"]) == ("worth_it", 1.0, 60)
    assert (verdict["figures"]["adapter"]["estimate"], verdict["figures"]["prompt"]["estimate"]) == (1.0, 0.0)
    assert verdict["adapter"]["answered_by"] == ["router@1"]
    assert made["form"] == verdict["prompt_form"] == f"served over HTTP as {server.base.id}"
    assert set(verdict["cost"]["ttft_p50_seconds"]) == {"prompt", "adapter"}
    assert verdict["cost"]["prompt_tokens"]["prompt"] == verdict["cost"]["prompt_tokens"]["adapter"]
    assert verdict["ledger"]["readings"] == 1
    assert "folder" in verdict["drift"]["why_none"]
    assert len(made["prompts"]) == 3 and "free text" in made["no_rivals"]


def test_a_second_version_on_the_same_test_rows_is_corrected_for_and_the_prompt_is_not_chosen_again(
    served: Desk, server: Server
) -> None:
    options = ("--url", server.url, "--metric", "exact_match", "--examples", "0")
    served.judge("--adapter", "router@1", *options)
    before = served.made()
    again = served.judge("--adapter", "router@1", *options)
    assert "the test rows are read for the second time" in again.output
    assert served.made()["verdict"]["ledger"] == {"readings": 2, "others": [], "torn_lines": 0}
    result = served.judge("--adapter", "router@2", *options)
    verdict = served.made()["verdict"]
    assert (verdict["verdict"], verdict["judged"]["difference"]) == ("cannot_tell", 0.0)
    assert (verdict["ledger"]["readings"], verdict["judged"]["comparisons"]) == (3, 2)
    assert verdict["ledger"]["others"][0]["subject"] == "served router@1"
    assert verdict["judged"]["p_corrected"] >= verdict["judged"]["p"]
    assert verdict["judged"]["rows_needed"] > 60 and "read 3 times" in result.output
    assert served.made()["made_at"] == before["made_at"]
    assert result.exit_code == 0
    assert served.judge("--adapter", "router@2", "--strict", *options).exit_code == 1


def test_readings_are_counted_in_the_state_folder_that_the_servers_config_file_names(
    served: Desk, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"home: {tmp_path / 'state'}\n")
    monkeypatch.delenv("HOTSHOE_HOME", raising=False)
    monkeypatch.setenv("HOTSHOE_CONFIG", str(config))
    options = ("--url", server.url, "--metric", "exact_match", "--examples", "0")
    served.judge("--adapter", "router@1", *options, names_ledger=False)
    assert len((tmp_path / "state" / LEDGER_FILE).read_text().splitlines()) == 2


def test_an_adapter_that_is_worse_than_the_best_prompt_is_not_worth_it(desk: Desk, server: Server) -> None:
    base = server.base.id
    desk.put(training=heard(base, 1, 30), validation=heard(base, 2, 8), test=heard(base, 3, 40))
    result = desk.judge("--adapter", "router", "--url", server.url, "--metric", "exact_match")
    assert result.exit_code == 3
    document = desk.made()
    assert document["verdict"]["verdict"] == "not_worth_it"
    assert document["prompts"][0]["figures"]["exact_match"]["estimate"] == 1.0
    assert "Prompting is enough" in document["said"][1]


def test_under_twenty_templates_it_cannot_be_told(desk: Desk, server: Server) -> None:
    def rows(seed: int, templates: int) -> list[Any]:
        return [
            chat(f"{name} {number}", f"router@1 heard: {name} {number}", system=None)
            for name in words(seed, templates)
            for number in range(1, 5)
        ]

    desk.put(training=rows(1, 10), validation=rows(2, 3), test=rows(3, 19))
    desk.judge("--adapter", "router@1", "--url", server.url, "--metric", "exact_match", "--examples", "0")
    judged = desk.made()["verdict"]["judged"]
    assert (judged["verdict"], judged["items"], judged["clusters"]) == ("cannot_tell", 76, 19)
    assert judged["clusters_needed"] >= 20


def test_a_server_that_is_not_there_is_said_before_a_reading_is_counted(served: Desk) -> None:
    error = refused(served.judge("--adapter", "router@1", "--url", "http://127.0.0.1:9", "--metric", "exact_match"))
    assert isinstance(error, EngineUnavailable)
    assert not (served.folder / "home").exists()


# On the reference path


@pytest.fixture
def here(desk: Desk) -> Desk:
    desk.put(training=labelled(1, 60), validation=labelled(2, 20), test=labelled(3, 40))
    return desk


def trained_adapter(folder: Path, base: BaseModel, **settings: Any) -> Path:
    """A hand-made adapter with a card as a run writes it."""
    from training.config import Facts, TrainingConfig, choose

    facts = Facts(60, 20, False, 100_000, 2048, "float32", "cpu", 1 << 30, False)
    config = TrainingConfig(data=Path("x"), name="x", **{"method": "qlora", "dtype": "float32", **settings})
    write_adapter(folder, base, scale=0.5)
    card = {"settings": choose(config, facts).as_dict(), "base": {"id": base.id, "digest": base.digest}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_before_training_every_prompt_and_rival_has_a_figure_and_the_best_is_kept(here: Desk) -> None:
    result = here.run("--examples", "2")
    assert result.exit_code == 0, result.output
    made = here.made()
    assert made["is_finished"]
    assert [prompt["name"] for prompt in made["prompts"]].count(made["best"]["name"]) == 1
    assert len(made["prompts"]) == 6
    assert made["task"] == {"kind": "labels", "label": "", "metric": "accuracy"}
    rivals = {rival["name"]: rival for rival in made["rivals"]}
    assert rivals["majority"]["figure"]["estimate"] == 0.5
    assert rivals["tfidf_linear"]["figure"]["estimate"] == 1.0
    assert "layer at" in rivals["linear_probe"]["detail"]
    assert "TF-IDF of words and letters with a linear model reaches 1.000 label accuracy" in result.output
    assert made["verdict"] is None
    best = summary(here.report)
    assert (best["best_prompt"], best["metric"], best["verdict"]) == (made["best"]["name"], "accuracy", None)
    assert len(best["prompts"]) == 6 and "messages" not in json.dumps(best)


def test_a_rival_that_the_adapter_does_not_beat_is_enough_and_the_drift_between_forms_is_shown(
    here: Desk, tmp_path: Path
) -> None:
    folder = trained_adapter(tmp_path / "adapter", load_base(here.base))
    result = here.judge("--adapter", folder, "--examples", "0", "--no-probe")
    assert result.exit_code == 0, result.output
    verdict = here.made()["verdict"]
    assert verdict["verdict"] == "cannot_tell"
    rivals = {rival["name"]: rival for rival in verdict["rivals"]}
    assert rivals["tfidf_linear"]["is_enough"] is True
    assert "TF-IDF of words and letters with a linear model is enough: the adapter is better by -100.0" in result.output
    assert verdict["adapter"]["identity"].startswith("sha256:")
    assert verdict["form"] == "on the reference path in float32"
    drift = verdict["drift"]
    assert (drift["trained_form"], drift["rows"]) == ("NF4, computed in float32", 40)
    assert {"estimate", "low", "high"} <= set(drift["difference"])
    assert verdict["cost"]["ttft_p50_seconds"] is None and "--url" in verdict["cost"]["not_timed"]


def test_a_lora_that_was_trained_in_the_form_it_is_scored_in_has_no_drift(here: Desk, tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter", load_base(here.base), method="lora")
    here.judge("--adapter", folder, "--examples", "0", "--no-probe", "--rows", "4")
    assert "which is the form scored here" in here.made()["verdict"]["drift"]["why_none"]


def test_only_some_rows_are_asked_where_that_is_wanted(here: Desk) -> None:
    result = here.run("--examples", "0", "--no-probe", "--rows", "7", "--json")
    assert json.loads(result.stdout) == {"report": str(here.report), **here.made()}
    assert here.made()["data"]["validation"]["rows"] == 7
    assert here.made()["prompts"][0]["figures"]["accuracy"]["items"] == 7


def test_a_prompt_of_ones_own_is_tried_too(here: Desk, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Say noun or verb.\n")
    here.run("--examples", "0", "--no-probe", "--prompt", tmp_path / "mine.txt")
    own = next(prompt for prompt in here.made()["prompts"] if prompt["name"] == "own prompt")
    assert own["messages"][0] == {"role": "system", "content": "Say noun or verb."}


def test_a_measurement_that_was_cut_off_goes_on_with_the_prompts_that_it_had(here: Desk) -> None:
    options = ("--examples", "0", "--no-probe")
    here.run(*options)
    whole = here.made()
    first = {**whole["prompts"][0], "seconds": 12345.0}
    here.report.write_text(json.dumps({**whole, "is_finished": False, "prompts": [first], "best": None}))
    with pytest.raises(ConfigInvalid, match="not finished"):
        summary(here.report)
    result = here.run(*options)
    assert result.stderr.count("validation rows") == 1
    assert sorted(one["seconds"] == 12345.0 for one in here.made()["prompts"]) == [False, True]
    here.report.write_text(json.dumps({**whole, "is_finished": False, "prompts": [first], "best": None}))
    assert here.run(*options, "--rows", "6").stderr.count("validation rows") == 2


def test_the_docs_list_every_option_and_every_verdict() -> None:
    page = (Path(__file__).parents[2] / "docs" / "baseline.md").read_text()
    command = typer.main.get_command(build_app()).commands["baseline"]
    options = {name for option in command.params for name in option.opts if name.startswith("--")}
    listed = set(re.findall(r"`(--[a-z-]+)`", page.partition("## All options")[2]))
    assert listed == options
    for word in (WORTH_IT, NOT_WORTH_IT, CANNOT_TELL, *TITLES):
        assert f"`{word}`" in page


# What is refused


def test_sets_that_are_one_another_are_refused(here: Desk) -> None:
    error = refused(here.run(validation="training"))
    assert isinstance(error, DataInvalid) and error.param == "validation"
    here.put(test=labelled(2, 20))
    error = refused(here.judge("--adapter", here.base))
    assert isinstance(error, DataInvalid) and error.param == "test"


def test_an_empty_validation_file_is_refused(here: Desk) -> None:
    (here.folder / "validation.jsonl").write_text("\n")
    assert isinstance(refused(here.run()), DataInvalid)


def test_rows_that_expect_no_object_among_objects_are_refused_by_line(desk: Desk) -> None:
    rows = [chat(name, '{"intent": "on"}') for name in words(1, 30)]
    desk.put(
        training=rows[:20], validation=rows[20:], test=[chat("what?", "no object"), chat("so?", '{"intent": "on"}')]
    )
    error = refused(desk.judge("--adapter", desk.base))
    assert isinstance(error, DataInvalid)
    assert [problem.path for problem in error.problems] == ["test.jsonl:1"]


def test_one_label_only_is_measured_and_the_majority_is_enough(desk: Desk) -> None:
    desk.put(training=[chat(w, "yes") for w in words(1, 20)], validation=[chat(w, "yes") for w in words(2, 30)])
    result = desk.run("--examples", "0")
    assert [rival["name"] for rival in desk.made()["rivals"]] == ["majority"]
    assert "The commonest label reaches 1.000 label accuracy" in result.output and "it is enough" in result.output


def test_rows_that_call_tools_are_asked_with_tools_and_calls_as_examples(desk: Desk) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in ("open", "close")
    ]

    def called(name: str, at: int) -> dict[str, Any]:
        function = {"name": ("open", "close")[at % 2], "arguments": json.dumps({"what": name})}
        asked = {"role": "user", "content": f"{function['name']} the {name}"}
        return {"messages": [asked, {"role": "assistant", "tool_calls": [{"function": function}]}], "tools": tools}

    rows = [called(name, at) for at, name in enumerate(words(1, 26))]
    desk.put(training=rows[:20], validation=rows[20:])
    result = desk.run("--examples", "1", "--no-probe", "--rows", "4", "--max-tokens", "4")
    assert result.exit_code == 0, result.output
    made = desk.made()
    assert made["task"] == {"kind": "objects", "label": "name", "metric": "exact_match"}
    linear = next(rival for rival in made["rivals"] if rival["name"] == "tfidf_linear")
    assert (linear["figure"]["estimate"], linear["gives"]) == (1.0, "label")
    shown = next(one for one in made["prompts"] if one["name"] == "labels listed, 1 examples by seed")["messages"]
    assert "The tools are: open, close." in shown[0]["content"] or "close, open." in shown[0]["content"]
    assert shown[2]["tool_calls"][0]["function"]["name"] in ("open", "close")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--test", "x.jsonl"), "--adapter is not given"),
        (("--adapter", "router@1"), "--test is not given"),
        (("--test", "x.jsonl", "--adapter", "no/such/folder"), "no adapter folder"),
        (("--margin", "2"), "margin is 2.0"),
        (("--metric", "loss"), "metric is 'loss'"),
        (("--metric", "field_f1"), "not all expected ones are"),
        (("--examples", "many"), "--examples is 'many'"),
        (("--examples", "65"), "between 0 and 64"),
        (("--group", "colour"), "not by 'colour'"),
        (("--prompt", "nothing.txt"), "cannot be read as a prompt"),
        (("--report", "no/such/folder/x.json"), "no folder no/such/folder"),
    ],
)
def test_settings_that_cannot_be_right_say_what_is(here: Desk, options: Sequence[str], says: str) -> None:
    error = refused(here.run("--no-probe", *options))
    assert isinstance(error, ConfigInvalid)
    assert says in error.message


def test_a_report_of_other_data_is_not_gone_on_from_and_no_other_file_is_written_over(here: Desk) -> None:
    here.run("--examples", "0", "--no-probe")
    here.put(training=labelled(7, 60))
    error = refused(here.judge("--adapter", here.base, "--no-probe"))
    assert isinstance(error, ConfigInvalid) and "other training data" in error.message
    here.report.write_text('{"kind": "something else"}')
    with pytest.raises(ConfigInvalid, match="no report"):
        summary(here.report)
    assert isinstance(refused(here.run()), OutputExists)
    assert here.report.read_text() == '{"kind": "something else"}'


def test_an_adapter_that_was_stopped_by_the_test_rows_is_not_judged_on_them(here: Desk, tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter", load_base(here.base))
    card = json.loads((folder / "card.json").read_text())
    card["data"] = {
        "training": {"digest": "sha256:1"},
        "validation": {"digest": read_data(here.folder / "test.jsonl").digest},
    }
    (folder / "card.json").write_text(json.dumps(card))
    error = refused(here.judge("--adapter", folder, "--no-probe", "--examples", "0", "--rows", "4"))
    assert isinstance(error, DataInvalid) and "as its validation data" in error.message
    assert not (here.folder / "home").exists()


def test_an_adapter_of_another_base_is_refused(here: Desk, tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter", load_base(here.base))
    card = json.loads((folder / "card.json").read_text())
    card["base"]["digest"] = "sha256:0"
    (folder / "card.json").write_text(json.dumps(card))
    assert isinstance(refused(here.judge("--adapter", folder, "--no-probe", "--examples", "0")), BaseMismatch)
    assert not (here.folder / "home").exists()
