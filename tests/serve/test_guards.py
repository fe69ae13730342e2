"""Who may ask: keys, hosts and the origins of web pages."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from magnetar.tests.api_server import MODEL, Service, error_of, saying, serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """A server for the tests that only ask to be refused."""
    with serving(saying(" x")) as service:
        yield service


def get(service: Service, path: str, **headers: str) -> Any:
    return service.http.get(path, headers=headers)


def test_with_a_key_everything_but_the_probes_wants_it() -> None:
    with serving(saying(" x"), api_key="sesame") as service:
        for wrong in (
            "",
            "Bearer",
            "Bearer wrong",
            "Basic sesame",
            "Bearer sésame",
            "Bearer sesame2",
        ):
            answer = service.http.get("/v1/models", headers=[(b"Authorization", wrong.encode())])
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert get(service, "/v1/models", Authorization="bearer sesame").status_code == 200
        for path in ("/livez", "/readyz", "/health"):
            assert get(service, path, Authorization="").status_code == 200
        assert get(service, "/nowhere", Authorization="").status_code == 401


def test_the_openai_client_sends_the_key() -> None:
    with serving(saying(" x"), api_key="sesame") as service:
        assert service.openai.models.list().data[0].id == MODEL
        with pytest.raises(openai.AuthenticationError):
            service.openai.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8080", "app.localhost"])
def test_a_request_that_names_this_machine_is_let_through(shared: Service, host: str) -> None:
    assert get(shared, "/livez", Host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "[::1", "127.a.b.c"]
)
def test_a_request_for_another_host_is_refused(shared: Service, host: str) -> None:
    assert error_of(get(shared, "/livez", Host=host), 403)["code"] == "host_not_allowed"


def test_with_a_key_the_host_does_not_matter_as_a_proxy_may_stand_before_it() -> None:
    with serving(saying(" x"), api_key="sesame") as service:
        assert get(service, "/v1/models", Host="llm.example").status_code == 200


def test_web_pages_of_other_origins_are_refused() -> None:
    with serving(saying(" x")) as service:
        for origin in ("https://evil.example", "null", "http://localhost:1"):
            answer = service.http.post(
                "/v1/completions", json={"prompt": "a"}, headers={"Origin": origin}
            )
            assert error_of(answer, 403)["code"] == "origin_not_allowed"
            assert "access-control-allow-origin" not in answer.headers
        own = get(service, "/livez", Origin=service.server.url)
        assert own.status_code == 200
