"""The dashboard in Debian's chromium: two people at once, three widths, by day and by night, by keyboard alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import Server, served

CHROMIUM = Path("/usr/bin/chromium")
SECONDS = 90_000  # milliseconds for anything that is waited for
WIDTHS = (400, 800, 1400)
KEYS = "train.steps=400 train.batch_size=8 train.log_every=1 train.validate_every=3 train.checkpoint_every=100"
# Texts whose contrast with what is painted behind them is too low (WCAG 2, 1.4.3), but those of disabled buttons.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const wrong = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].map((child) => child.nodeType === 3 ? child.data.trim() : "").join("");
    if (!text || node.matches("title, desc, option, noscript, script, :disabled, .hidden")) continue;
    if (!node.getClientRects().length) continue;
    const style = getComputedStyle(node), colour = parse(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) wrong.push(`${node.tagName} ${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return wrong;
}"""


class Watched:
    """A page of a browser of its own; what goes wrong in it is kept in `faults`."""

    def __init__(self, browser, server: Server, **options) -> None:
        self.server, self.faults = server, []
        self.page = browser.new_context(base_url=server.url, **options).new_page()
        self.page.set_default_timeout(SECONDS)
        self.page.on(
            "console", lambda line: self.faults.append(line.text) if line.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._asked)

    def _asked(self, request) -> None:
        if not request.url.startswith((f"{self.server.url}/", "data:")):
            self.faults.append(f"foreign: {request.url}")

    def go(self, path: str) -> None:
        assert self.page.goto(path).ok
        self.page.evaluate("window.same = true")

    def sees(self, selector: str, **having) -> None:
        """Wait until an element is there, on the page as it was opened."""
        self.page.locator(selector, **having).first.wait_for(state="attached")
        assert self.page.evaluate("window.same"), "the page was loaded anew"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


def loaded(watched: Watched, selector: str) -> int:
    """Wait until all pictures of a selector are decoded, and return their number."""
    for image in watched.page.locator(selector).all():
        image.scroll_into_view_if_needed()
    watched.page.wait_for_function(
        "(selector) => [...document.querySelectorAll(selector)].every((image) => image.complete && image.naturalWidth)",
        arg=selector,
    )
    return watched.page.locator(selector).count()


def assert_fits(watched: Watched, path: str) -> None:
    """Assert that a page fits its window, that its texts can be read, and that it has no fault."""
    watched.go(path)
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path}: wider than the window"
    assert watched.page.evaluate(CONTRAST) == [], path
    assert watched.faults == [], path


@pytest.mark.proof
def test_two_browsers_at_once(browser, shared: Path, tmp_path: Path):
    """One builds photographs and the other trains on them; both see all of it, on pages that nobody loads anew."""
    raw = shared / "clothing10"
    with served(tmp_path, "--raw-root", raw, "--slots", "cpu=2") as server:
        one, other = Watched(browser, server), Watched(browser, server, color_scheme="dark")
        for watched in (one, other):
            watched.go("/")
        one.page.get_by_role("link", name="build one").click()
        build = one.page.locator("#build")
        build.get_by_label("Raw images").fill(str(raw))
        build.get_by_label("Name of the data set").fill("clothes")
        build.get_by_label("Images at most").fill("80")
        build.get_by_text("More options").click()
        build.get_by_label("Samples in a shard").fill("8")
        build.get_by_role("button", name="Build").click()
        one.page.wait_for_url("**/jobs/1")
        one.page.evaluate("window.same = true")
        other.sees("#overview a", has_text="Build clothes")
        one.sees("#head .state.succeeded")
        one.sees("#body rect.done:nth-of-type(9)")
        assert one.page.locator("#body rect.open").count() == 0
        assert "succeeded" in one.page.locator("#announcement").text_content()
        other.sees("#overview table a", has_text="clothes")

        other.page.get_by_role("link", name="clothes", exact=True).click()
        assert loaded(other, ".samples img") == 24
        assert loaded(other, ".mean, .components img") >= 4
        drawn = other.page.locator(".samples a").all_text_contents()
        other.page.get_by_role("link", name="Draw others").click()
        other.page.wait_for_url("**draw=2**")
        assert other.page.locator(".samples a").all_text_contents() != drawn
        other.page.get_by_role("link", name="Train on it").click()
        train = other.page.locator("#train")
        assert train.get_by_label("Data set").input_value() == "clothes"
        train.get_by_label("Name of the run").fill("first")
        train.get_by_label("Recipe", exact=True).select_option("tiny")
        train.get_by_text("More options").click()
        train.get_by_label("Keys of the recipe").fill(KEYS.replace(" ", "\n"))
        train.get_by_role("button", name="Train").click()
        other.page.wait_for_url("**/jobs/2")
        other.page.evaluate("window.same = true")
        other.sees("#head a", has_text="Run first")
        for watched in (one, other):
            watched.go("/runs/first")
        assert one.faults == other.faults == []
        server.again()  # the pages go on by themselves
        for watched in (one, other):  # a curve of several points, and the first validation
            watched.sees(".charts polyline")
            watched.page.wait_for_function(
                "() => document.querySelector('.charts polyline')?.getAttribute('points').split(' ').length >= 6"
            )
            watched.sees(".charts polyline.c1")
        one.page.get_by_role("button", name="Cancel").click()
        other.sees(".state.cancelled")
        lost = ("net::ERR_", "not refreshed")  # while there was no server
        assert [fault for fault in one.faults + other.faults if not any(word in fault for word in lost)] == []


@pytest.fixture(scope="module")
def server(browser, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that has a bit of everything: finished, failed, running and waiting jobs, with long names."""
    raw = shared
    long = "a-name-that-is-as-long-as-names-may-be-" + "x" * 24
    with served(tmp_path_factory.mktemp("looks"), "--raw-root", raw, "--slots", "cpu=1") as server:
        jobs = [
            server.submit("build", dataset="d", raw=str(raw / "clothing10"), limit=40, samples_per_shard=8),
            server.submit("build", dataset="odd", raw=str(raw / "odd-images"), layout="class-folders"),
            server.submit(
                "train", dataset="d", run="r", recipe="tiny", set={"train.steps": "2", "train.batch_size": "4"}
            ),
        ]
        server.submit("feed")
        for job in jobs:
            server.ended(job["id"])
        server.submit("train", dataset="d", run=long, recipe="tiny")
        server.submit("verify", dataset=long)
        server.until(lambda: server.job(5)["progress"].get("done"))
        yield server


@pytest.mark.proof
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_fits_and_can_be_read(browser, server: Server, width: int, scheme: str):
    watched = Watched(browser, server, viewport={"width": width, "height": 900}, color_scheme=scheme)
    paths = ("/", "/jobs", "/jobs/1", "/jobs/2", "/jobs/3", "/jobs/4", "/jobs/5", "/jobs/6", "/datasets", "/datasets/d")
    for path in (*paths, "/runs", "/runs/r", "/workers", "/new", "/docs", "/login"):
        assert_fits(watched, path)
    watched.page.context.close()


@pytest.mark.proof
def test_the_keyboard_alone(browser, server: Server):
    """The first key leads past the navigation; the focus is seen, and stays where it is when the page changes."""
    watched = Watched(browser, server)
    watched.go("/jobs/5")
    watched.page.keyboard.press("Tab")
    assert watched.page.evaluate("document.activeElement.className") == "skip"
    watched.page.keyboard.press("Enter")
    watched.page.keyboard.press("Tab")
    assert watched.page.evaluate("document.activeElement.id") == "cancel-5"
    assert watched.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    before = watched.page.locator("#head").inner_html()
    watched.page.wait_for_function("(before) => document.getElementById('head').innerHTML !== before", arg=before)
    assert watched.page.evaluate("document.activeElement.id") == "cancel-5"
    assert watched.page.evaluate("window.same")


@pytest.mark.proof
def test_without_scripts_pages_are_whole_and_come_anew(browser, server: Server):
    watched = Watched(browser, server, java_script_enabled=False)
    assert watched.page.goto("/runs/r").ok
    assert watched.page.locator(".charts polyline").count() >= 3
    assert watched.page.goto("/jobs/5").ok
    with watched.page.expect_navigation():
        pass
    assert watched.page.locator("#head progress").count() == 1
