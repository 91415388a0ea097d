"""Requests made up from the server's own OpenAPI schema, valid and broken ones."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from live_server import Limits, Service, running, settle
from tiny_models import tiny_model, tiny_tokenizer

from nanochat.infer.engine import Engine
from nanochat.serve.service import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is a dev extra")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def service() -> Service:
    def served(name: str, **settings: Any) -> Served:
        return Served(name, Engine(tiny_model(), tiny_tokenizer(), max_slots=16), **settings)

    return Service([served("random"), served("base", chat=False)], Limits(max_tokens=3))


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[Any]:
    with running(service) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        settle(service)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_schema_knows(api: Any, mode: GenerationMode) -> None:
    tried: Counter[str] = Counter()
    for result in api.get_all_operations():
        operation = result.ok()

        # A fixed number of examples, the same ones each time, and no search for smaller ones.
        @settings(
            max_examples=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            response = case.call()
            tried[f"{case.operation.label} {response.status_code}"] += 1
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert "Traceback" not in response.text

        with suppress(Unsatisfiable):  # nothing can be wrong about GET /health
            ask()
    print(dict(tried))
    expected = "200" if mode == GenerationMode.POSITIVE else "400"
    assert {label for label in tried if label.endswith(expected)} >= {
        f"POST /v1/{path} {expected}" for path in ("chat/completions", "completions")
    }
