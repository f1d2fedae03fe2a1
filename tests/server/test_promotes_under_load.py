"""P8: promotes while two tenants' clients ask for an adapter of one name. Each answer is wholly one version's, of the
asker's own tenant, and of one that the alias named at some time between the question and the answer.
"""

from __future__ import annotations

import bisect
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection as Connection
from typing import Any

import pytest

from adapters.bases import BaseModel
from server.engine.base import engine_name
from tests.fixtures.service import Server, chunks_of, eventually, running

KEY = "the-operators-own-key"
NAME, VERSIONS, CLIENTS = "router", 3, 16
TENANTS = ("acme", "other")
AFTER_EACH = 4  # answers to questions asked after a promote returned, before the next one


@dataclass(frozen=True)
class Answer:
    """What one client got. `mark` is a log-probability, which tells the weights that made it."""

    asked: float
    answered: float
    models: frozenset[str]  # of every chunk of a stream
    mark: float


@dataclass
class Team:
    """One tenant: its key, what its answers must look like by version, its moves and answers."""

    tenant: str
    headers: dict[str, str]
    marks: dict[str, float] = field(default_factory=dict)
    moves: list[tuple[float, float, int]] = field(default_factory=list)  # called, returned, version
    answers: list[Answer] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, answer: Answer) -> None:
        with self.changed:
            self.answers.append(answer)
            self.changed.notify_all()

    def wait(self, asked_after: float) -> None:
        """Until a few questions that were asked after the time have their answers."""

        def is_there() -> bool:
            newest = self.answers[-8 * AFTER_EACH :]
            return sum(answer.asked > asked_after for answer in newest) >= AFTER_EACH

        with self.changed:
            assert self.changed.wait_for(is_there, 60), "the clients got no more answers"


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("promotes"), api_key=KEY) as one:
        yield one


@pytest.fixture(scope="module")
def teams(keyed: Server) -> list[Team]:
    """Two tenants with three versions of `router` each, all of different weights."""
    found = []
    for tenant in TENANTS:
        row = keyed.http.post("/v1/keys", json={"tenant": tenant, "scopes": ["infer", "upload", "promote"]}).json()
        team = Team(tenant, {"authorization": f"Bearer {row['key']}"})
        for number in range(1, VERSIONS + 1):
            assert push(keyed, team, seed=7000 + 10 * len(found) + number) == number
        found.append(team)
    assert len({mark for team in found for mark in team.marks.values()}) == VERSIONS * len(TENANTS)
    return found


def push(server: Server, team: Team, seed: int) -> int:
    """A new version of the team's `router`, with the mark of its weights noted; returns its number."""
    row = server.push(NAME, server.adapter(seed=seed), headers=team.headers).json()
    assert row["status"] == "ready", row
    with closing(Connection("127.0.0.1", server.port)) as connection:
        team.marks[row["id"]] = ask(connection, team, row["id"], is_stream=False).mark
    return int(row["version"])


def ask(connection: Connection, team: Team, model: str, *, is_stream: bool) -> Answer:
    """One short answer with the log-probability of its first token. A bare connection is quicker than a client."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "a b c"}], "logprobs": True}
    body |= {"max_tokens": 4, "stream": True} if is_stream else {"max_tokens": 1}
    asked = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), team.headers)
    response = connection.getresponse()
    text = response.read().decode()
    answered = time.monotonic()
    assert response.status == 200, text
    if is_stream:
        chunks = chunks_of([line[6:] for line in text.splitlines() if line.startswith("data: ")])
    else:
        chunks = [json.loads(text)]
    tokens = [token for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]
              for token in choice["logprobs"]["content"]]  # fmt: skip
    return Answer(asked, answered, frozenset(chunk["model"] for chunk in chunks), tokens[0]["logprob"])


@contextmanager
def clients_asking(server: Server, teams: list[Team]) -> Iterator[None]:
    """Every tenant's clients ask for `router` without a pause; every other one streams."""
    is_over = threading.Event()

    def keep_asking(team: Team, is_stream: bool) -> None:
        with closing(Connection("127.0.0.1", server.port, timeout=60)) as connection:
            while not is_over.is_set():
                team.add(ask(connection, team, NAME, is_stream=is_stream))

    with ThreadPoolExecutor(CLIENTS * len(teams)) as pool:
        work = [pool.submit(keep_asking, team, i % 2 == 1) for team in teams for i in range(CLIENTS)]
        try:
            yield
        finally:
            is_over.set()
        for one in work:
            one.result()


def promote(server: Server, team: Team, number: int) -> None:
    called = time.monotonic()
    answer = server.http.put(f"/v1/adapters/{NAME}/aliases/stable", json={"version": number}, headers=team.headers)
    assert answer.status_code == 200, answer.text
    team.moves.append((called, time.monotonic(), number))


def promote_often(server: Server, team: Team, count: int) -> None:
    """Move `stable` round and round, each time after the last move has been seen by some clients."""
    for number in itertools.islice(itertools.cycle([*range(2, VERSIONS + 1), 1]), count):
        promote(server, team, number)
        team.wait(asked_after=team.moves[-1][1])


def drain_one(server: Server, team: Team) -> str:
    """Push and promote a further version, then move on and retire it at once: its running answers end, and it goes."""
    number = push(server, team, seed=7100 + TENANTS.index(team.tenant))
    promote(server, team, number)
    team.wait(asked_after=team.moves[-1][1])
    promote(server, team, 1)
    answer = server.http.delete(f"/v1/adapters/{NAME}/versions/{number}", headers=team.headers)
    assert answer.json()["status"] == "retired", answer.text
    name = engine_name(team.tenant, NAME, number)
    eventually(lambda: name not in {one.engine_name for one in server.call(server.engine.loaded())})
    team.wait(asked_after=time.monotonic())
    return f"{NAME}@{number}"


def check(team: Team) -> int:
    """Every answer against the moves; returns for how many answers only one version was possible."""
    moves = [(float("-inf"), float("-inf"), 1), *team.moves]
    called, returned = [move[0] for move in moves], [move[1] for move in moves]
    certain = 0
    for answer in team.answers:
        first = bisect.bisect_right(returned, answer.asked) - 1  # had returned before the question
        last = bisect.bisect_right(called, answer.answered) - 1  # was called before the answer
        possible = {f"{NAME}@{move[2]}" for move in moves[first : last + 1]}
        [model] = answer.models
        assert model in possible, (answer, possible)
        assert answer.mark == team.marks[model], f"not {team.tenant}'s {model}"
        certain += len(possible) == 1
    return certain


def run(server: Server, teams: list[Team], promotes: int) -> None:
    """That many promotes in all, half of each tenant, a drain of each, and all that must hold of the answers."""
    for team in teams:
        promote(server, team, 1)
        team.moves.clear()
        team.answers.clear()
    counted = {label: completed(server, label) for label in labels(teams)}
    loads = server.metric("hotshoe_adapter_loads_total", outcome="loaded")
    with clients_asking(server, teams), ThreadPoolExecutor(len(teams)) as pool:
        for one in [pool.submit(promote_often, server, team, promotes // len(teams)) for team in teams]:
            one.result()
        assert server.metric("hotshoe_adapter_loads_total", outcome="loaded") == loads, "no promote needed a load"
        drained = [pool.submit(drain_one, server, team) for team in teams]
        gone = {team.tenant: one.result() for team, one in zip(teams, drained, strict=True)}
    for team in teams:
        assert len(team.moves) == promotes // len(teams) + 2
        assert check(team) >= AFTER_EACH * len(team.moves)
        by_model = Counter(next(iter(answer.models)) for answer in team.answers)
        assert set(by_model) == set(team.marks)
        for model, count in by_model.items():
            label = f"{team.tenant}/{model}"
            wanted = count + counted.get(label, 1)  # one question told the mark of the version that went
            eventually(lambda label=label, wanted=wanted: completed(server, label) == wanted)
        del team.marks[gone[team.tenant]]
    assert all(row.references == 0 for row in server.services.residents.rows()), "nothing is held"


def labels(teams: list[Team]) -> list[str]:
    return [f"{team.tenant}/{model}" for team in teams for model in team.marks]


def completed(server: Server, label: str) -> float:
    return server.metric("hotshoe_requests_total", model=label, outcome="completed")


def test_p8_promotes_under_load_leave_every_answer_with_its_tenant_and_version(
    keyed: Server, teams: list[Team]
) -> None:
    run(keyed, teams, promotes=40)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_p8_two_thousand_promotes_under_load(keyed: Server, teams: list[Team]) -> None:
    run(keyed, teams, promotes=2000)
