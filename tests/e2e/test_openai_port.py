"""`isthmus serve --openai` as OpenAI's own package meets it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme

from isthmus.apps.bench.cloud_process import CloudProcess, fresh_keys
from isthmus.edge import Device
from isthmus.protocol.bearer import TOKENS, TokenList
from isthmus.protocol.errors import ServiceError
from tests.edge_bundle import write_tiny

HELLO: list[Any] = [{"role": "user", "content": "hello, who are you?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Port:
    """A cloud with the API beside it, and a token of alice's."""

    def __init__(self, bundle: Path, keys: Path, *options: str) -> None:
        self.bundle, self.keys, self.port = bundle, keys, free_port()
        more = ["--openai", f"127.0.0.1:{self.port}", "--context-s", "600", *options]
        self.cloud = CloudProcess(bundle, keys, 1, more=more)

    def __enter__(self) -> Port:
        self.cloud.__enter__()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return self
            time.sleep(0.05)
        raise TimeoutError((self.keys / "cloud.log").read_text())

    def __exit__(self, *reason: object) -> None:
        self.cloud.__exit__()

    def client(self, token: str, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=token, max_retries=0, **options)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        status, told = answer.status, json.loads(answer.read())
        connection.close()
        return status, told


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[tuple[Port, str]]:
    with fresh_keys() as keys:
        token = TokenList(keys / TOKENS).issue("alice")
        with Port(bundle, keys) as port:
            yield port, token


@pytest.fixture
def client(served: tuple[Port, str]) -> Iterator[openai.OpenAI]:
    with served[0].client(served[1]) as client:
        yield client


def test_it_says_what_a_device_says(served: tuple[Port, str], client: openai.OpenAI) -> None:
    port, _ = served
    with Device(port.bundle, port.cloud.address, keys=port.keys, mode="stream", threads=1) as device:
        list(device.chat(HELLO, max_tokens=12))
        chatted, prompted = device.stats.text, device.stats.prompt_tokens
        list(device.generate("hello", max_tokens=12))
        completed = device.stats.text
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    assert answer.choices[0].message.content == chatted and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompted, 12)
    assert client.completions.create(prompt="hello", **GREEDY).choices[0].text == completed
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, **GREEDY)
    chunks = list(
        client.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(one.delta.content or "" for one in said) == whole.choices[0].message.content
    assert said[0].delta.role == "assistant" and said[-1].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    extras = [one.model_extra["isthmus"] for one in said if one.model_extra and "isthmus" in one.model_extra]
    assert extras and {extra["source"] for extra in extras} == {"cloud"}
    pieces = list(client.completions.create(prompt="hello", stream=True, **GREEDY))
    text = client.completions.create(prompt="hello", **GREEDY).choices[0].text
    assert "".join(piece.choices[0].text for piece in pieces) == text


def test_choices_and_prompts_come_in_order(client: openai.OpenAI) -> None:
    sampled: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 7, "n": 2}
    several = client.completions.create(prompt=["hello", "and you"], **sampled)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    alone = client.completions.create(prompt="and you", **sampled)
    assert [choice.text for choice in several.choices[2:]] == [choice.text for choice in alone.choices]
    assert alone.choices[0].text != alone.choices[1].text
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(prompt="and you", stream=True, **sampled):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in alone.choices]


def test_many_ask_at_once(client: openai.OpenAI) -> None:
    expected = client.completions.create(prompt="hello", **GREEDY).choices[0].text

    def ask(_: int) -> str:
        said: str = client.completions.create(prompt="hello", **GREEDY).choices[0].text
        return said

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(ask, range(36))) == {expected}


def test_who_leaves_early_leaves_a_sound_port(client: openai.OpenAI) -> None:
    for _ in range(70):  # more than answers may be under way
        stream = client.completions.create(prompt="hello", stream=True, **GREEDY | {"max_tokens": 300})
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).completions.create(prompt="hello", **GREEDY | {"max_tokens": 300})
    assert client.completions.create(prompt="hello", **GREEDY).choices[0].text


def test_errors_are_in_openais_form(served: tuple[Port, str], client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here: tiny"):
        client.completions.create(prompt="hello", **GREEDY | {"model": "gpt"})
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(prompt="hello " * 3000, stream=True, **GREEDY)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the vocabulary has") as token:
        client.completions.create(prompt=[10**9], **GREEDY)
    assert token.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        served[0].client("isk-none").models.list()
    bearer = {"Authorization": f"Bearer {served[1]}", "Content-Type": "application/json"}
    for method, path, body, status in (
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "' + b"x" * (5 << 20) + b'"}', 413),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/v2", b"", 404),
    ):
        found, told = served[0].raw(method, path, body, **bearer)
        assert found == status and told["error"]["message"] and told["error"]["type"] == "invalid_request_error"
    assert served[0].raw("GET", "/health") == (200, {"status": "ok"})


def test_a_withdrawn_token_ends_its_answers(served: tuple[Port, str]) -> None:
    port, _ = served
    tokens = TokenList(port.keys / TOKENS)
    token = tokens.issue("mallory")
    with port.client(token) as client:
        assert client.models.list()
        client.completions.create(prompt="hello", **GREEDY)
        tokens.withdraw("mallory")
        deadline = time.monotonic() + 20
        with pytest.raises(openai.AuthenticationError):
            while time.monotonic() < deadline:
                client.completions.create(prompt="hello", **GREEDY)


def test_without_tokens_this_machine_alone_is_served(bundle: Path) -> None:
    with fresh_keys() as keys, Port(bundle, keys) as port:
        with port.client("anything") as client:
            assert client.completions.create(prompt="hello", **GREEDY).choices[0].text
        status, told = port.raw("GET", "/v1/models", Host="evil.example")
        assert status == 403 and "localhost" in told["error"]["message"]
        token = TokenList(keys / TOKENS).issue("alice")  # from now on one is needed
        deadline = time.monotonic() + 20
        while port.raw("GET", "/v1/models")[0] != 401 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert port.raw("GET", "/v1/models")[0] == 401
        assert port.client(token).models.list()


def test_a_cloud_in_the_clear_answers_too(bundle: Path, tmp_path: Path) -> None:
    with fresh_keys() as keys, Port(bundle, keys, "--no-keys") as port, port.client("anything") as client:
        assert client.completions.create(prompt="hello", **GREEDY).choices[0].text


def test_certificates_are_used(bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(tmp_path / "cert.pem"), append=bool(number))
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with fresh_keys() as keys:
        token = TokenList(keys / TOKENS).issue("alice")
        options = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
        with Port(bundle, keys, *options) as port:
            connection = http.client.HTTPSConnection("127.0.0.1", port.port, context=context, timeout=60)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token}"})
            assert json.loads(connection.getresponse().read())["data"][0]["id"] == "tiny"
            connection.close()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--openai", "nowhere"], "is no address for --openai"),
        (["--openai", "0.0.0.0:0"], "would be read on the way"),
        (["--openai", "127.0.0.1:0", "--tls-cert", "x.pem"], "go together"),
        (["--openai", "127.0.0.1:0", "--tls-cert", "no.pem", "--tls-key", "no.pem"], "there is no file no.pem"),
        (["--openai", "127.0.0.1:0", "--tls-cert", __file__, "--tls-key", __file__], "cannot be used"),
        (["--tls-cert", "x.pem"], "have no effect without --openai"),
        (["--openai", "192.0.2.1:1", "--tls-cert", "CERT", "--tls-key", "KEY"], "there are no tokens"),
        (["--openai", "127.0.0.1:TAKEN"], "cannot listen on 127"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    bundle: Path, tmp_path: Path, options: list[str], problem: str
) -> None:
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    with socket.socket() as taken, fresh_keys() as keys:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"CERT": str(tmp_path / "both.pem"), "KEY": str(tmp_path / "both.pem")}
        told = [names.get(one, one.replace("TAKEN", str(taken.getsockname()[1]))) for one in options]
        with pytest.raises(ServiceError, match=problem), CloudProcess(bundle, keys, 1, more=told):
            pass
