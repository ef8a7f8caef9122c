"""The page at `/` in headless Chromium, served by the application itself."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Page, Route, expect, sync_playwright
from ray import serve

from clipflow_ray.config import DEFAULT_CHECKPOINT
from clipflow_ray.serve.app import build_app
from tests.conftest import encoded, photo

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[2] / "clipflow_ray" / "serve" / "page"
ALPHA = 0.1
VERDICTS = {"likely_ai": "likely AI", "inconclusive": "inconclusive", "no_ai_signal": "no AI signal"}
# Chromium writes this to the console for every answer that is not 2xx, even if the page handles it.
REFUSAL = "Failed to load resource"
# A file is a name and its bytes, or a number of zero bytes.
DROP = """([files, kind]) => {
  const transfer = new DataTransfer();
  for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name, {type: "image/jpeg"}));
  const detail = {bubbles: true, cancelable: true};
  document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", {...detail, dataTransfer: transfer})
                                              : new ClipboardEvent("paste", {...detail, clipboardData: transfer}));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's `chromium` to test the page")


@pytest.fixture(scope="module")
def served(trained: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the application, with the tiny checkpoint and the packaged one's model card."""
    checkpoint = shutil.copytree(trained, tmp_path_factory.mktemp("page") / "checkpoint")
    shutil.copy(Path(DEFAULT_CHECKPOINT) / "MODEL_CARD.md", checkpoint)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {
        "checkpoint": str(checkpoint),
        "alpha": ALPHA,
        "ingress_cpus": 0.2,
        "detector_cpus": 0.2,
        "decoders": 1,
    }
    serve.run(build_app(arguments), route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def browser(served: str) -> Iterator[Browser]:
    """Started after the server, because Serve does not start while Playwright's event loop runs."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """Console messages, script errors and requests to other origins of the test's page; checked by `page`."""
    return []


@pytest.fixture
def page(browser: Browser, served: str, problems: list[str]) -> Iterator[Page]:
    """The page, loaded at the size of a phone; fails the test if the page reported a problem."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, base_url=served)
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda sent: None if sent.url.startswith((served, "blob:", "data:")) else problems.append(sent.url)
    )
    page.goto("/")
    expect(page.locator("#model-id")).not_to_be_empty()
    yield page
    context.close()
    assert not problems


def jpeg(seed: int) -> bytes:
    return encoded(photo(seed, (240, 320)))


def images(count: int) -> list[FilePayload]:
    return [{"name": f"{at}.jpg", "mimeType": "image/jpeg", "buffer": jpeg(7000 + at)} for at in range(count)]


def give(page: Page, files: list[FilePayload]) -> None:
    page.get_by_label("Choose images").set_input_files(files)


def wait_for(page: Page, count: int) -> None:
    expect(page.locator("#list .item:not(.waiting)")).to_have_count(count, timeout=30_000)


def answers(page: Page) -> list[dict[str, Any]]:
    """The raw JSON of every image that has one."""
    return [json.loads(text) for text in page.locator("#list pre").all_text_contents() if text]


def once(page: Page, refuse: Callable[[Route], None]) -> None:
    """`refuse` answers the first upload; the server answers the others.

    Neither a server at its limit nor a broken network can be had for exactly one request.
    """
    page.route("**/v1/detect", refuse, times=1)


def refusal(status: int, code: str, **headers: str) -> Callable[[Route], None]:
    body = {"error": {"code": code, "message": "The server says no.", "request_id": "r-1"}}
    return lambda route: route.fulfill(status=status, headers=headers, json=body)


def serious(page: Page) -> list[str]:
    """Serious findings of the accessibility checker axe-core."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {rule['nodes']}" for rule in found if rule["impact"] in ("serious", "critical")]


def only_refusals(problems: list[str], count: int) -> None:
    assert len(problems) == count and all(text.startswith(REFUSAL) for text in problems), problems
    problems.clear()


def test_chosen_images_get_verdicts_in_their_order(page: Page) -> None:
    give(page, images(6))
    wait_for(page, 6)
    assert page.locator("#list h3").all_text_contents() == [f"{at}.jpg" for at in range(6)]
    results = [answer["results"][0] for answer in answers(page)]
    assert [result["id"] for result in results] == [f"{at}.jpg" for at in range(6)]
    said = page.locator("#list .verdict").all_text_contents()
    assert said == [VERDICTS[result["verdict"]] for result in results]
    expect(page.locator("#status")).to_contain_text(re.compile(r"^6 images: \d (likely AI|inconclusive|no AI signal)"))
    expect(page.locator("#list canvas:visible")).to_have_count(6)
    for result, words in zip(results, page.locator("#list figcaption").all_text_contents(), strict=True):
        assert float(words.removeprefix("p = ").split(":")[0]) == pytest.approx(result["p_value"], rel=0.05)


def test_the_scale_marks_p_and_alpha_in_their_order(page: Page) -> None:
    give(page, images(6))
    wait_for(page, 6)
    for at, answer in enumerate(answers(page)):
        drawing = page.locator("#list svg").nth(at)
        limit, here = (
            float((drawing.locator(selector).get_attribute(name) or "").rstrip("%"))
            for selector, name in ((".limit", "x1"), (".here", "cx"))
        )
        assert 0 <= here <= 100
        assert (here <= limit + 1e-3) == ("below_alpha" in answer["results"][0]["reasons"])


def test_a_broken_file_among_good_ones_is_reported_as_broken(page: Page) -> None:
    broken: FilePayload = {"name": "<b>note</b>.jpg", "mimeType": "image/jpeg", "buffer": b"a note"}
    give(page, [*images(1), broken, *images(2)[1:]])
    wait_for(page, 3)
    said = page.locator("#list .verdict").all_text_contents()
    assert said[1] == "not checked" and said[0] in VERDICTS.values() and said[2] in VERDICTS.values()
    item = page.locator("#list .item").nth(1)
    assert item.locator("code").inner_text() == "unsupported_format"
    assert item.locator("h3").inner_text() == "<b>note</b>.jpg"
    assert "1 not checked" in page.locator("#status").inner_text()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(page: Page, kind: str) -> None:
    page.evaluate(DROP, [[[f"{kind}-{at}.jpg", list(jpeg(7100 + at))] for at in range(2)], kind])
    wait_for(page, 2)
    assert page.locator("#list h3").all_text_contents() == [f"{kind}-0.jpg", f"{kind}-1.jpg"]
    assert set(page.locator("#list .verdict").all_text_contents()) <= set(VERDICTS.values())


@pytest.mark.parametrize(("kind", "words"), [("drop", "That was no file."), ("paste", "The clipboard holds no image.")])
def test_a_drop_or_paste_without_a_file_is_an_alert(page: Page, kind: str, words: str) -> None:
    page.evaluate(DROP, [[], kind])
    expect(page.get_by_role("alert")).to_contain_text(words)


def test_more_images_than_the_limit_are_refused_and_none_is_sent(page: Page) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    give(page, images(33))
    expect(page.get_by_role("alert")).to_contain_text("33 images are too many: this page takes 32 at a time.")
    assert page.locator("#list .item").count() == 0
    assert not [url for url in sent if url.endswith("/v1/detect")]


def test_a_file_above_the_size_limit_is_not_sent(page: Page) -> None:
    page.evaluate(DROP, [[["large.jpg", 11 * 2**20], ["0.jpg", list(jpeg(1))]], "drop"])
    wait_for(page, 2)
    assert page.locator("#list .item").first.locator("code").inner_text() == "too_large_bytes"
    assert page.locator("#list .verdict").last.inner_text() in VERDICTS.values()


def test_a_busy_server_is_asked_again_after_its_waiting_time(page: Page, problems: list[str]) -> None:
    once(page, refusal(429, "overloaded", **{"Retry-After": "1"}))
    give(page, images(1))
    expect(page.get_by_role("status")).to_have_text("The server is busy. Trying again in 1 second.")
    wait_for(page, 1)
    assert page.locator("#list .verdict").inner_text() in VERDICTS.values()
    only_refusals(problems, 1)


def test_a_lost_connection_is_an_alert_with_a_button_to_try_again(page: Page, problems: list[str]) -> None:
    once(page, lambda route: route.abort())
    give(page, images(1))
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.get_by_role("button", name="Try again").click()
    wait_for(page, 1)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_label("Choose images")).to_be_focused()
    only_refusals(problems, 1)


def test_images_that_are_refused_together_are_sent_one_by_one(page: Page, problems: list[str]) -> None:
    once(page, refusal(413, "batch_too_large"))
    give(page, images(3))
    wait_for(page, 3)
    assert set(page.locator("#list .verdict").all_text_contents()) <= set(VERDICTS.values())
    only_refusals(problems, 1)


def test_an_image_that_is_refused_alone_shows_the_servers_words_and_code(page: Page, problems: list[str]) -> None:
    once(page, refusal(413, "file_too_large"))
    give(page, images(1))
    wait_for(page, 1)
    assert page.locator("#list .why").inner_text().split() == ["The", "server", "says", "no.", "file_too_large", "r-1"]
    only_refusals(problems, 1)


def test_a_token_is_asked_for_and_kept_in_memory_only(page: Page, problems: list[str]) -> None:
    once(page, refusal(401, "unauthorized"))
    give(page, images(1))
    field = page.get_by_label("access token")
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    with page.expect_request("**/v1/detect") as sent:
        field.fill("secret-7\n")
        page.get_by_role("button", name="Use this token").click()
    assert sent.value.header_value("authorization") == "Bearer secret-7"
    wait_for(page, 1)
    expect(field).to_be_hidden()
    once(page, refusal(401, "unauthorized"))
    give(page, images(1))
    expect(field).to_have_accessible_description(re.compile("^That token was not accepted."))
    field.fill("secret-8")
    field.press("Enter")
    wait_for(page, 2)
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert "secret-" not in kept + page.content()
    only_refusals(problems, 2)


def test_the_raw_json_can_be_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    give(page, images(1))
    wait_for(page, 1)
    page.locator("#list summary").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status")).to_have_text("Raw JSON copied.")
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == answers(page)[0]


def test_images_can_be_chosen_by_keyboard_with_a_visible_focus(page: Page) -> None:
    # From here on Playwright catches file choosers. If it started with the key press, it would sometimes be too late.
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose images")).to_be_focused()
    assert page.locator("#drop").evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(images(1))
    wait_for(page, 1)
    page.get_by_role("button", name="Clear").press("Enter")
    expect(page.locator("#results")).to_be_hidden()
    expect(page.get_by_label("Choose images")).to_be_focused()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_the_page_passes_the_accessibility_check_and_fits_the_screen(
    page: Page, scheme: Literal["light", "dark"], width: int
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    broken: FilePayload = {"name": "long_" * 30 + ".jpg", "mimeType": "image/jpeg", "buffer": b"a note"}

    assert not serious(page)
    give(page, [*images(3), broken])
    wait_for(page, 4)
    for summary in page.locator("summary:visible").all():
        summary.click()
    give(page, images(33))
    expect(page.get_by_role("alert")).not_to_be_empty()
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_shows_the_model_and_its_card(page: Page, served: str) -> None:
    told = page.request.get("/v1/model").json()
    assert page.locator("#model-id").inner_text() == told["model"]["model_id"]
    assert float(page.locator("#alpha").inner_text()) == told["alpha"] == ALPHA
    page.get_by_text("Model card: how").click()
    card = page.locator("#card-text")
    expect(card.get_by_role("heading", name="How they were made")).to_be_visible()
    lines = told["card"].splitlines()
    row = [line for line in lines if line.startswith("| ")][-1]
    expect(card.get_by_role("row", name=" ".join(row.strip("| ").split(" | ")), exact=True)).to_be_visible()
    first = lines.index("## How they were made") + 1
    assert len(lines[first + 1]) > 60, "a paragraph of one line shows nothing of how lines are joined"
    assert " ".join(lines[first : first + 2]).replace("`", "") in card.inner_text()
    assert "**" not in card.inner_text() and "|" not in card.inner_text()
    assert page.get_by_role("link", name="API documentation").get_attribute("href") == "/docs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_documentation_passes_the_same_check(
    browser: Browser, served: str, scheme: Literal["light", "dark"]
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, base_url=served)
    page.goto("/docs")
    expect(page.get_by_role("heading", name="POST /v1/detect")).to_be_visible()
    assert not serious(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()


def test_the_page_uses_no_word_that_promises_more_than_the_method() -> None:
    for file in PAGE.iterdir():
        assert not re.findall(r"\b(real|fake|authentic|probability|genuine)\b", file.read_text(), re.IGNORECASE)
