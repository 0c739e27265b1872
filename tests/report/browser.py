"""Headless Chromium for the tests of the page; nothing here reaches for the network."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1100,900"
).split()


def start(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile that logs its console and its requests; skips the test where there is none."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip(f"{CHROMIUM} and {DRIVER} are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield browser
    finally:
        browser.quit()


def show(browser: webdriver.Chrome, page: Path) -> dict[str, list[Any]]:
    """Load a page and wait until every figure is drawn: {"console": messages, "requests": addresses}."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.drawn") != "all":
        assert time.monotonic() < deadline, [entry["message"] for entry in browser.get_log("browser")]
        time.sleep(0.05)
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {
        "console": [entry["message"] for entry in browser.get_log("browser")],
        "requests": [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"],
    }
