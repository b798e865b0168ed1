"""The live page in a real browser: headless Chromium, driven over its own protocol. Skipped where there is none."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server, start

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no chromium or chromedriver: apt install chromium chromium-driver"
    ),
]
ALICE, BOB = "alice-key-0123456", "bob-key-0123456789"
WAIT_SECONDS = 90
HOSTILE = "<img src=x onerror=alert(1)>"


class Page:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, server: Server) -> None:
        self.driver.get(f"{server.url}/")

    def text(self, selector: str) -> str:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText).join('\\n')", selector
        )

    def until(self, seen: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, WAIT_SECONDS, 0.1).until(lambda _: seen())

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def problems(self) -> list[str]:
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflows(self) -> bool:
        return self.driver.execute_script("return document.documentElement.scrollWidth > window.innerWidth")

    def picture_of(self, group: str) -> str:
        """The drawn map of a cache group."""
        script = "return document.querySelector(`[data-group=${arguments[0]}] canvas`).toDataURL()"
        return self.driver.execute_script(script, group)


@pytest.fixture
def page() -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(f'[keys]\n"{HOSTILE}" = "{ALICE}"\nbob = "{BOB}"\n')
    file.chmod(0o600)
    server = start("--api-keys-file", str(file), "--disable-log-requests", "--served-model-name", HOSTILE)
    yield server
    server.process.terminate()
    server.process.wait(20)


def ask(server: Server, text: str, max_tokens: int = 1, key: str | None = None) -> str:
    """The id of a finished chat request, as the server calls its one choice."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"x-api-key": key} if key else {}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=300)
    return f"{answer.json()['id']}-0"


def test_a_long_prefill_is_seen_and_then_its_end(server: Server, page: Page) -> None:
    page.resize(1240, 1400)
    page.open(server)
    page.until(lambda: "live" in page.text("#state"))
    assert "thalweg-tiny" in page.text("header") and "kernels" in page.text("header")
    assert "context limit" in page.text("#about")
    before = page.picture_of("csa")
    text = "deep water " * 25_000
    asking = threading.Thread(target=ask, args=(server, text))
    asking.start()
    page.until(lambda: page.text(".phase.prefill"))
    first = page.until(lambda: page.text("[data-phase=prefill] .facts"))
    page.until(lambda: page.text("[data-phase=prefill] .facts") not in ("", first))
    assert " / " in first and "tokens" in first
    during = page.until(lambda: (picture := page.picture_of("csa")) != before and picture)
    asking.join()
    again = ask(server, text)
    row = f'[data-id="{again}"]'
    page.until(lambda: page.text(f"#finished {row}"))
    shown = page.text(row)
    assert "length" in shown and " device" in shown and " computed" in shown and "to first token" in shown
    page.until(lambda: page.picture_of("csa") != during)
    assert "cached" in page.text("[data-group=window]")
    assert "device" in page.text("#sources") and "cold" in page.text("#reasons")
    assert page.problems() == []


def test_it_fits_a_phone_and_a_wide_window_in_light_and_dark(server: Server, page: Page) -> None:
    ask(server, "hello", 3)
    page.open(server)
    for width in (320, 390, 760, 1600):
        page.resize(width, 900)
        for scheme in ("light", "dark"):
            feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
            page.until(lambda: page.text("#finished .request"))
            assert not page.overflows(), width
    assert page.problems() == []


def test_with_keys_a_caller_sees_only_its_own_and_markup_stays_text(guarded: Server, page: Page) -> None:
    own, other = ask(guarded, "hello", 3, ALICE), ask(guarded, "hello", 3, BOB)
    page.open(guarded)
    page.until(lambda: page.driver.find_element("id", "key").is_displayed())
    assert page.problems() == [] and own not in page.driver.page_source
    field = page.driver.find_element("id", "key")
    field.send_keys("not-a-known-key\n")
    page.until(lambda: "does not know" in page.text("#key-problem"))
    assert all("401" in problem for problem in page.problems())
    page.driver.find_element("id", "key").send_keys(f"{ALICE}\n")
    page.until(lambda: page.text(f'[data-id="{own}"]'))
    assert other not in page.driver.page_source and ALICE not in page.driver.page_source
    assert HOSTILE in page.text("#whose") and HOSTILE in page.text("header")
    assert page.driver.execute_script("return document.querySelectorAll('main img').length") == 0
    assert page.driver.execute_script("return [sessionStorage.length, localStorage.length]") == [1, 0]
    page.driver.refresh()
    page.until(lambda: page.text(f'[data-id="{own}"]'))
    page.driver.execute_script(
        "[...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('forget')).click()"
    )
    page.until(lambda: page.driver.find_element("id", "key").is_displayed())
    assert own not in page.driver.page_source
    assert page.problems() == []


def test_the_page_asks_nothing_of_other_hosts(server: Server, page: Page) -> None:
    page.open(server)
    page.until(lambda: "live" in page.text("#state"))
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(names) >= 4 and all(name.startswith(server.url) for name in names), json.dumps(names)
    page.driver.execute_script(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    assert page.driver.execute_script("return window.ran === undefined"), "inline scripts are forbidden"


def test_the_picture_of_the_documentation_is_small() -> None:
    picture = Path(__file__).parents[2] / "docs" / "live-page.png"
    assert picture.stat().st_size <= 300 * 1024
