"""The page: it loads nothing, and in a real browser it asks, shows, stops and remembers."""

import base64
import hashlib
import re
import shutil

import pytest
from support.serving import Served

from sfi_local.serve.page import CSP, page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def test_it_is_one_file_that_loads_nothing_and_runs_nothing_else(client):
    response = client.get("/")
    assert response.status_code == 200 and response.headers["content-security-policy"] == CSP
    assert "http://" not in page() and "https://" not in page() and "//" not in re.sub(r"//[^\"'`]*\n", "", page()).replace("</", "")
    assert not re.search(r"<[^>]+\s(on\w+|style|src)=", page())
    for tag in ("script", "style"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        assert len(text) == 1 and base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode() in CSP
    assert "unsafe" not in CSP and "default-src 'none'" in CSP and "frame-ancestors 'none'" in CSP


@pytest.fixture(scope="module")
def browser(tiny, tmp_path_factory):
    """(driver, its By, waiting for a function, the server) at the page."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium with chromedriver here: apt-get install chromium chromium-driver")
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    served = Served(tmp_path_factory.mktemp("page"), tiny, "--ctx", 4096, "--threads", 1, "--mode", "sfi")
    served.until_ready()
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,800"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get(served.url)
    yield driver, By, lambda true: WebDriverWait(driver, 60).until(lambda _: true()), served
    driver.quit()
    served.process.terminate()
    served.process.communicate(timeout=60)


def test_a_text_is_asked_about_the_strip_lights_up_and_the_chat_is_there_again(browser, tmp_path):
    driver, By, wait, _ = browser

    def at(name):
        return driver.find_element(By.ID, name)
    wait(lambda: at("status").text == "ready" and at("name").text == "tiny" and at("send").is_enabled())
    driver.execute_script("localStorage.setItem('sfi-settings', JSON.stringify({max_tokens: '60', seed: '5'}))")
    (tmp_path / "fox.txt").write_text(TEXT)
    at("file").send_keys(str(tmp_path / "fox.txt"))
    wait(lambda: "fox.txt" in at("files").text)
    at("question").send_keys("Which <b>animal</b> jumps?")
    at("send").click()
    wait(lambda: at("send").is_displayed() and " tokens" in driver.find_elements(By.CSS_SELECTOR, ".facts")[-1].text)
    said = driver.find_element(By.CSS_SELECTOR, ".user")
    assert "<b>animal</b>" in said.text and "fox.txt" in said.text  # text stays text
    assert at("strip").is_displayed() and int(at("n-fast").text) > 3
    at("strip").click()
    assert "fox" in at("passage").text or "dog" in at("passage").text
    at("question").send_keys("And?\n")
    wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, ".assistant .facts span")) > 8)
    wait(lambda: "read earlier" in driver.find_elements(By.CSS_SELECTOR, ".facts")[-1].text)
    driver.refresh()
    wait(lambda: "Which" in at("chats").text)
    driver.find_element(By.CSS_SELECTOR, "#chats button").click()
    assert len(driver.find_elements(By.CSS_SELECTOR, ".said")) == 4
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_stop_ends_an_answer_within_a_step(browser):
    driver, By, wait, served = browser
    wait(lambda: driver.find_element(By.ID, "send").is_enabled())
    driver.execute_script("localStorage.setItem('sfi-settings', JSON.stringify({max_tokens: '3000', min_p: '0', top_k: '0', temperature: '5'}))")
    driver.find_element(By.ID, "new").click()
    driver.find_element(By.ID, "question").send_keys("Go on\n")
    driver.execute_script("document.getElementById('stop').click()")  # the random model may have ended by itself
    wait(lambda: driver.find_element(By.ID, "send").is_displayed())
    wait(lambda: all(slot["state"] == "idle" for slot in served.get("/slots")[1]["slots"]))


def test_it_fits_a_phone(browser):
    driver, By, wait, _ = browser
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True})
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    driver.find_element(By.ID, "menu").click()
    assert driver.find_element(By.ID, "new").is_displayed()
