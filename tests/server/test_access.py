"""API keys, what each may ask for, and that no two share a prefix. Proved by counters, never by timing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Server, start
from thalweg.errors import ConfigError
from thalweg.server.access import ApiKey, ApiKeys, KeyLimits, load_keys

ALICE, BOB, DEFAULT = "alice-key-0123456", "bob-key-0123456789", "variable-key-01234"
CAROL, DAVE = "carol-key-012345", "dave-key-0123456"
LIMITS = f"""
carol = {{ key = "{CAROL}", max_parallel_requests = 2, max_prompt_tokens = 50, max_body_bytes = "4KiB" }}
dave = {{ key = "{DAVE}", max_queued_requests = 1, max_parallel_requests = 8 }}
[limits]
max_parallel_requests = 32
"""
MODEL = "thalweg-tiny"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys in a file that everybody can read, and one in the environment."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys]\nalice = "{ALICE}"\nbob = "{BOB}"\n{LIMITS}')
    file.chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THALWEG_API_KEY", DEFAULT)
        server = start("--api-keys-file", str(file))
    yield server
    server.process.terminate()
    server.process.wait(10)


def as_caller(server: Server, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def hits(server: Server) -> float:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return next(s.value for f in families for s in f.samples if s.name == "thalweg_prefix_cache_hits_total")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/reset_prefix_cache"),
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("GET", "/no/such/place"),
        ("GET", "/health/../v1/models"),
    ],
)
def test_without_a_known_key_there_is_only_401(guarded: Server, method: str, path: str) -> None:
    unknown = "nobody-s-key-0123"
    schemes = ("Bearer", ALICE, f"Basic {ALICE}", f"Bearer {unknown}", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x")
    wrong: list[dict[str, str]] = [{}, *({"Authorization": value} for value in schemes)]
    wrong += [{"x-api-key": unknown}, {"x-api-key": ""}, {"x-api-key": ALICE, **bearer(unknown)}]
    for headers in wrong:
        response = httpx.request(method, guarded.url + path, headers=headers)
        assert response.status_code == 401, (headers, response.text)
        error = response.json()["error"]
        assert error["code"] == "invalid_api_key" and set(error) == {"message", "type", "param", "code"}
        assert response.headers["www-authenticate"] == "Bearer"
        assert not any(value in response.text for value in headers.values() if len(value) > 7)


def test_what_monitors_ask_is_open(guarded: Server) -> None:
    for path in ("/health", "/version", "/metrics"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_every_way_to_show_a_key(guarded: Server) -> None:
    for headers in (
        bearer(ALICE), bearer(BOB), bearer(DEFAULT), {"x-api-key": ALICE}, {"authorization": f"bearer {BOB}"},
        {"Authorization": "Basic eA==", "x-api-key": ALICE},
    ):  # fmt: skip
        assert httpx.post(f"{guarded.url}/v1/chat/completions", json=HELLO, headers=headers).status_code == 200
        assert httpx.get(f"{guarded.url}/no/such/place", headers=headers).status_code == 404


def test_the_openai_client(guarded: Server) -> None:
    assert [m.id for m in as_caller(guarded, ALICE).models.list()] == [MODEL]
    with pytest.raises(openai.AuthenticationError) as caught:
        as_caller(guarded, "nobody-s-key-0123").chat.completions.create(model=MODEL, **HELLO)
    assert caught.value.code == "invalid_api_key"


def chat(client: OpenAI, text: str, **extra: str) -> int:
    """Cached tokens of a chat request."""
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=1, extra_body=extra
    )
    return answer.usage.prompt_tokens_details.cached_tokens


def complete(client: OpenAI, text: str, **extra: str) -> int:
    """Cached tokens of a streamed completion."""
    options = {"include_usage": True}
    chunks = client.completions.create(
        model=MODEL, prompt=text, max_tokens=1, stream=True, stream_options=options, extra_body=extra
    )
    return list(chunks)[-1].usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("cached_tokens", [chat, complete])
@pytest.mark.parametrize("extra", [{}, {"cache_salt": "same"}, {"user_id": "same"}])
def test_two_keys_never_share_and_one_key_does(guarded: Server, cached_tokens, extra: dict) -> None:
    text = str(uuid.uuid4()) + " some words" * 200
    alice, bob = as_caller(guarded, ALICE), as_caller(guarded, BOB)
    before = hits(guarded)
    assert cached_tokens(alice, text, **extra) == 0
    assert cached_tokens(bob, text, **extra) == 0
    assert cached_tokens(as_caller(guarded, DEFAULT), text, **extra) == 0
    assert hits(guarded) == before
    own = [cached_tokens(client, text, **extra) for client in (alice, bob)]
    assert own[0] == own[1] > 300
    assert hits(guarded) == before + sum(own)


def test_salt_and_user_divide_a_tenant_and_cannot_be_mistaken_for_each_other(guarded: Server) -> None:
    text = str(uuid.uuid4()) + " some words" * 100
    alice = as_caller(guarded, ALICE)
    spaces = [
        {}, {"cache_salt": "ab"}, {"user_id": "ab"}, {"cache_salt": "a", "user_id": "b"}, {"cache_salt": '["ab", ""]'},
        {"cache_salt": "ab\0"}, {"cache_salt": "\0ab"},
    ]  # fmt: skip
    assert [chat(alice, text, **space) for space in spaces] == [0] * len(spaces)
    assert all(chat(alice, text, **space) > 0 for space in spaces)
    assert chat(alice, text, prompt_cache_key="k", user="u") > 0


def report(server: Server, key: str, text: str, **extra: str) -> dict:
    """The cache report of a chat request."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "return_cache_report": True, **extra}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer(key), timeout=60)
    return response.json()["cache"]


def test_not_even_the_reason_of_a_miss_tells_of_another_tenant(guarded: Server) -> None:
    text = str(uuid.uuid4()) + " some words" * 100
    assert httpx.post(f"{guarded.url}/reset_prefix_cache", headers=bearer(DEFAULT)).status_code == 200
    assert report(guarded, ALICE, text)["reason"] == "cold"
    told = report(guarded, BOB, text)
    assert told["reason"] == "cold" and told["divergence_token"] is None
    assert report(guarded, ALICE, text, cache_salt="x")["reason"] == "tenant"


def test_a_restart_keeps_the_disk_of_each_tenant_apart(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    flags = ("--api-keys-file", str(file), "--kv-disk-dir", str(tmp_path / "disk"))
    text = "some words " * 200
    for names in (("alice", "bob"), ("renamed", "bob")):
        file.write_text(f'[keys]\n{names[0]} = "{ALICE}"\n{names[1]} = "{BOB}"\n')
        server = start(*flags)
        try:
            first = report(server, ALICE, text, cache_salt="same")
            other = report(server, BOB, text, cache_salt="same")
        finally:
            server.process.terminate()
            server.process.wait(20)
        assert (first["disk_tokens"] > 300) == (names[0] == "renamed")
        if names[0] == "alice":
            assert other["resume_token"] == 0 and other["reason"] == "cold"
    assert other["disk_tokens"] == first["disk_tokens"], "a tenant hits what is its own"


def test_a_disk_filled_by_one_tenant_is_cold_for_another(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[keys]\nalice = "{ALICE}"\nbob = "{BOB}"\n')
    for key in (ALICE, BOB):
        server = start("--api-keys-file", str(file), "--kv-disk-dir", str(tmp_path / "disk"))
        try:
            told = report(server, key, "some words " * 200)
        finally:
            server.process.terminate()
            server.process.wait(20)
        assert told["resume_token"] == 0 and told["reason"] == "cold"


def test_prompts_that_repeat_without_a_hit_are_noticed_once_and_no_key_is_ever_shown() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THALWEG_API_KEY", "not this one, as the flag is stronger")
        server = start("--api-key", ALICE)
    try:
        client = as_caller(server, ALICE)
        assert all(chat(client, "word " * 200, cache_salt=str(i)) == 0 for i in range(25))
        metrics = httpx.get(f"{server.url}/metrics").text
    finally:
        server.process.terminate()
        server.process.wait(10)
    log = server.process.stderr.read()
    assert log.count("began like earlier ones and none hit the prefix cache") == 1
    assert "20 prompts of 'default'" in log
    assert ALICE not in log + metrics


def post(server: Server, key: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer(key), timeout=60)


@contextmanager
def streams(server: Server, key: str, count: int, *, begun: bool = True) -> Iterator[None]:
    """So many long answers under way, or waiting for their turn."""
    kept: list[Iterator[str]] = []  # what nobody holds any more is closed
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=server.url, headers=bearer(key), timeout=60))
        for number in range(count):
            body = {"prompt": f"{number}", "max_tokens": 50_000, "ignore_eos": True, "stream": True}
            response = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
            assert response.status_code == 200
            kept.append(response.iter_lines())
            if begun:
                next(line for line in kept[-1] if line.startswith("data: "))
        yield


def refusal(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status and words in response.text, response.text
    assert ("retry-after" in response.headers) == (status == 429)


def until_served(server: Server, key: str) -> None:
    deadline = time.monotonic() + 30
    while post(server, key, prompt="a", max_tokens=1).status_code != 200:
        assert time.monotonic() < deadline


def test_a_key_has_so_many_requests_open_and_no_more(guarded: Server) -> None:
    guarded.wait_idle()
    with streams(guarded, CAROL, 2):
        refusal(post(guarded, CAROL, prompt="a"), 429, "2 requests are open; max_parallel_requests")
        assert post(guarded, BOB, prompt="a", n=3, max_tokens=1).status_code == 200
    until_served(guarded, CAROL)
    for body in ({"prompt": "a", "n": 3}, {"prompt": ["a", "b", "c"]}):
        refusal(post(guarded, CAROL, **body), 400, "3 choices exceed max_parallel_requests of this API key, 2")


def test_a_key_has_so_many_requests_queued_and_no_more(guarded: Server) -> None:
    """Four run at once: those of one key may fill all places, and another key still decides only about its own."""
    guarded.wait_idle()
    with streams(guarded, BOB, 4):
        with streams(guarded, DAVE, 1, begun=False):
            refusal(post(guarded, DAVE, prompt="a"), 429, "1 requests are queued; max_queued_requests")
            with streams(guarded, ALICE, 2, begun=False):
                pass
        deadline = time.monotonic() + 30
        while guarded.health()["waiting"]:
            assert time.monotonic() < deadline
        with streams(guarded, DAVE, 1, begun=False):
            pass
    until_served(guarded, DAVE)


def test_a_key_has_its_own_lengths(guarded: Server) -> None:
    refusal(post(guarded, CAROL, prompt=[5] * 51), 400, "51 prompt tokens exceed max_prompt_tokens of this API key, 50")
    assert post(guarded, CAROL, prompt=[5] * 50, max_tokens=1).status_code == 200
    assert post(guarded, ALICE, prompt=[5] * 51, max_tokens=1).status_code == 200
    chat = {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
        body = chat if "responses" not in path else {"input": "word " * 100, "max_output_tokens": 16}
        response = httpx.post(guarded.url + path, json=body, headers=bearer(CAROL), timeout=60)
        refusal(response, 400, "max_prompt_tokens of this API key")
    for key, status in ((CAROL, 413), (ALICE, 200)):
        response = post(guarded, key, prompt=[5] * 20, max_tokens=1, stop=["a" * 5000])
        assert response.status_code == status, response.text
        assert status == 200 or "4096 bytes, max_body_bytes of this API key" in response.text


def test_only_an_administrator_forgets_what_all_have_cached(guarded: Server) -> None:
    for path in ("/reset_prefix_cache", "/flush_cache"):
        refused = httpx.post(guarded.url + path, headers=bearer(ALICE))
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "permission_denied"
        assert httpx.post(guarded.url + path, headers=bearer(DEFAULT)).status_code == 200


def test_limits_of_all_keys_and_of_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("""
        [keys]
        ann = "secret-one"
        ben = { key = "secret-two", admin = true, max_prompt_tokens = 7, max_body_bytes = "1MiB" }
        [limits]
        max_prompt_tokens = 5
        max_queued_requests = 3
    """)
    keys = load_keys("secret-three", file, {})
    ann, ben, single = (keys.caller(f"secret-{number}".encode()) for number in ("one", "two", "three"))
    assert ann is not None and ben is not None and single is not None
    assert ann.limits == single.limits == KeyLimits(max_prompt_tokens=5, max_queued_requests=3)
    assert ben.limits == KeyLimits(max_prompt_tokens=7, max_queued_requests=3, max_body_bytes=2**20)
    assert [ann.admin, ben.admin, single.admin] == [False, True, True]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[keys]\nann = "short"', "API key 'ann' has 5 characters; at least 8"),
        ('[keys]\nann = ""', "API key 'ann' has 0 characters"),
        ('[keys]\nann = "long enough"', "API key 'ann': only ASCII"),
        ('[keys]\nann = "länger-als-acht"', "API key 'ann': only ASCII"),
        ('[keys]\nann = "secret-one"\nben = "secret-one"', "API key 'ben' is the same as 'ann'"),
        ('[keys]\nann = "secret-one"\nann = "secret-two"', "Cannot overwrite a value"),
        ("[keys]\nann = {max_prompt_tokens = 5}", "API key 'ann' is not a text, and no table with a text `key`"),
        (
            '[keys]\nann = {key = "secret-one", max_prompt_token = 5}',
            "'max_prompt_token'. Did you mean 'max_prompt_tokens'",
        ),
        ('[keys]\nann = {key = "secret-one", max_queued_requests = 0}', "max_queued_requests 0, which is not a whole"),
        (
            '[keys]\nann = {key = "secret-one", max_prompt_tokens = true}',
            "max_prompt_tokens True",
        ),
        ('[keys]\nann = {key = "secret-one", max_body_bytes = "1GiB"}', "over the server's own, 67108864"),
        ('[keys]\nann = {key = "secret-one", admin = "yes"}', "API key 'ann' has admin 'yes'"),
        ('limits = 5\n[keys]\nann = "secret-one"', "limits is no table"),
        ('[keys]\nann = "secret-one"\n[limits]\nkey = 5', r"\[limits\] unknown entry 'key'"),
        ("[keys]\nann = 12345678", "API key 'ann' is not a text"),
        ("[keys]", r"a table \[keys\]"),
        ("", r"a table \[keys\]"),
        ("keys = 5", r"a table \[keys\]"),
        ('[key]\nann = "secret-one"', "unknown entry 'key'. Did you mean 'keys'"),
        ("[keys", "keys.toml"),
    ],
)
def test_wrong_key_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_keys(None, file, {})
    assert "secret" not in caught.value.message


def test_wrong_single_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_keys(None, tmp_path / "nothing.toml", {})
    for flag, environment in (("", {}), (None, {"THALWEG_API_KEY": ""})):
        with pytest.raises(ConfigError, match="'default' has 0 characters"):
            load_keys(flag, None, environment)
    file = tmp_path / "keys.toml"
    file.write_text('[keys]\ndefault = "secret-one"')
    with pytest.raises(ConfigError, match="'default' is that of --api-key"):
        load_keys("secret-two", file, {})
    assert load_keys(None, None, {}).names == ()


def test_only_a_readable_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[keys]\nann = "secret-one"')
    file.chmod(0o600)
    assert load_keys(None, file, {}).names == ("ann",)
    assert caplog.text == ""
    file.chmod(0o640)
    load_keys(None, file, {})
    assert "can be read by other users" in caplog.text and "secret" not in caplog.text


def test_a_tenant_is_that_of_the_key_whatever_its_name_and_whenever() -> None:
    secret_one, secret_two = ApiKey("secret-one"), ApiKey("secret-two")
    one, other = ApiKeys({"a": secret_one}), ApiKeys({"b": secret_two, "c": secret_one})
    found, again = one.caller(b"secret-one"), other.caller(b"secret-one")
    assert found is not None and again is not None and (found.name, again.name) == ("a", "c")
    assert found.tenant == again.tenant == "6271329bc23bc326a66fd0f949003c82e14e5bed1e924ade8fe050b067928c20"
    assert one.caller(b"secret-two") is None and one.caller(b"\xff") is None
