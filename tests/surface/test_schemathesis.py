"""A1: no answer that the OpenAPI document does not declare, whatever is sent; a long run is `make fuzz`."""

from __future__ import annotations

import pytest

from server.access import ROUTES
from server.errors import STATUS
from server.openapi import errors_of
from tests.fixtures.service import Server
from tests.surface.fuzz import Fuzzer

EXAMPLES = 10


def test_the_document_has_every_route_with_its_errors(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    found = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert found == {(route.method, route.path) for route in ROUTES} - {("GET", "/openapi.json")}
    statuses = {status for status, _ in STATUS.values()}
    for route in ROUTES:
        assert set(errors_of(route)) <= statuses | {405}, route
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_a1_every_answer_is_declared(keyed: Server) -> None:
    keyed.pushed("router")
    report = Fuzzer(keyed).run(EXAMPLES, seed=1)
    assert report.failures == []
    assert report.requests > 200 and report.statuses[200] > 10 and report.statuses[400] > 10
    assert not [status for status in report.statuses if status in (500, 502, 507)]
    assert keyed.say("router").status_code == 200


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a1_every_answer_is_declared_over_many_seeds(keyed: Server) -> None:
    for seed in range(2, 6):
        assert Fuzzer(keyed).run(100, seed).failures == []
