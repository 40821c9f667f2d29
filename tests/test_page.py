"""report.html: one file from the disk, as a parser and as a real browser see it.

The browser is chromium, driven by selenium, without a window; where either is missing, its tests
skip. Names are as hostile as the file system allows.
"""

import contextlib
import html.parser
import importlib.util
import json
import os
import re
import shutil
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import classify, read_table, wait_until

import custom2_tester as tester

NAMES = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"]
HOSTILE = "<img src=x onerror=alert(1)>.wav"
FAILED = "broken.wav"
UNPLAYABLE = "old.au"
CLIPS = [
    HOSTILE,
    "take #3.wav",
    'a&b "c".wav',
    os.fsdecode(b"J\xfcrgen.wav"),
    "50% ?x=1.wav",
    "javascript:alert(2).wav",
    "sub #1/a.wav",
    "it's $title.wav",
    "1001_b.wav",
    "1001_a.wav",
    UNPLAYABLE,
    f"{'x' * 200}.wav",
    "</script><script>alert(3)</script>.wav".replace("/", "\u2215"),
]


def readable(name):
    """A name as the page shows it: bytes that are no UTF-8 as a mark."""
    return os.fsencode(name).decode("utf-8", "replace")


class Page(html.parser.HTMLParser):
    """The rows of a page as a parser reads them, and every tag in it."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.rows = []
        self.in_row = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "tr" and "data-class" in attributes:
            self.rows.append({"tags": [], "text": "", **attributes})
            self.in_row = True
        if self.in_row:
            self.rows[-1]["tags"].append((tag, attributes))

    def handle_endtag(self, tag):
        self.in_row = self.in_row and tag != "tr"

    def handle_data(self, data):
        if self.in_row:
            self.rows[-1]["text"] += data

    def links(self, tag, attribute):
        return [a[attribute] for name, a in self.tags if name == tag and attribute in a]


@pytest.fixture(scope="module")
def site(corpus, trained, tmp_path_factory):
    """Input and output folder of a run with --visualize; two labels are right, three wrong."""
    folder = tmp_path_factory.mktemp("page") / "in # put"
    out = folder.parent / "out put"
    for name, path in zip(CLIPS, sorted(corpus.iterdir()), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(path)
        kind = "AU" if name == UNPLAYABLE else "WAV"
        with (folder / name).open("wb") as file:
            soundfile.write(file, samples, rate, format=kind, subtype="PCM_16")
    (folder / FAILED).write_bytes(b"RIFF")
    model = trained / "best_model.pth"
    classify(folder, model, out)
    rows = tester.read_csv(out / "classification_results.csv")
    answer = {row["file"]: row["predicted_class"] for row in rows}
    table = []
    for i, name in enumerate((*CLIPS[:2], *CLIPS[6:9])):
        emotion = NAMES[(NAMES.index(answer[name]) + (i > 1)) % 6]
        table.append({"file": name, "emotion": emotion})
    table.append({"file": FAILED, "emotion": "Sad"})
    tester.write_csv(folder / "labels.csv", ("file", "emotion"), table)
    options = ("--labels", folder / "labels.csv", "--visualize", "--min_confidence", 0.5)
    classify(folder, model, out, *options, "--workers", 2)
    return folder, out


@pytest.fixture(scope="module")
def page(site):
    """The page, parsed."""
    return Page((site[1] / "report.html").read_text(encoding="utf-8"))


def test_the_template_is_at_most_120_lines():
    assert tester.PAGE.template.count("\n") <= 121  # the last one ends the page


def test_the_page_takes_nothing_from_the_network(site, page):
    text = (site[1] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]", text.replace("// Players", ""))
    assert not re.search(r"@import|url\(", text)
    assert not page.links("script", "src") + page.links("link", "href")
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"iframe", "object", "embed", "base", "link"}
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_links_are_percent_encoded_and_lead_to_files(site, page):
    folder, out = site
    links = page.links("a", "href") + page.links("img", "src")
    for url in links:
        assert re.fullmatch(r"[A-Za-z0-9/._~%-]+", url), url
        path = os.path.join(os.fsencode(out), urllib.parse.unquote_to_bytes(url))  # noqa: PTH118
        assert Path(os.fsdecode(path)).is_file(), url
    heard = {os.fsencode(name) for name in (*CLIPS, FAILED)}
    linked = {urllib.parse.unquote_to_bytes(url) for url in links}
    prefix = os.fsencode(os.path.relpath(folder, out)) + b"/"
    assert {url.removeprefix(prefix) for url in linked if url.startswith(prefix)} == heard
    assert len(page.links("img", "src")) == len(set(page.links("img", "src"))) == len(CLIPS)


def test_names_stay_text(page):
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
    shown = " ".join(row["text"] for row in page.rows)
    for name in (*CLIPS, FAILED):
        assert readable(name) in shown
    assert {attributes.get("src") for tag, attributes in page.tags if tag == "img"}.isdisjoint(
        {"x"}
    )


def test_mistakes_stand_first_and_failures_are_none(site, page):
    rows = tester.read_csv(site[1] / "classification_results.csv")
    wrong = [r["file"] for r in rows if r["true_class"] not in ("", r["predicted_class"])]
    wrong.remove(FAILED)
    assert len(wrong) == 3
    found = [row for row in page.rows if row.get("class") == "wrong"]
    assert found == page.rows[:3]
    assert {name for name in wrong for row in found if readable(name) in row["text"]} == set(wrong)
    text = (site[1] / "report.html").read_text(encoding="utf-8")
    assert f"{len(CLIPS) + 1} files, 2 of 5 labelled files right" in text


def test_only_what_browsers_play_gets_a_player(page):
    for row in page.rows:
        playable = any("data-play" in attributes for _, attributes in row["tags"])
        is_failed = row["data-class"] == "failed"
        assert playable == (UNPLAYABLE not in row["text"] and not is_failed), row["text"]


def test_a_row_tells_answer_bars_level_truth_and_error(site, page):
    rows = {readable(r["file"]): r for r in tester.read_csv(site[1] / "classification_results.csv")}
    assert len(page.rows) == len(rows)
    for shown in page.rows:
        [row] = [r for name, r in rows.items() if name in shown["text"]]
        assert shown["data-class"] == (row["predicted_class"] or "failed")
        assert row["error"] in shown["text"]
        level = f"{float(row['level_db']):+.1f}" if row["level_db"] else ""
        assert level in shown["text"]
        assert row["true_class"] in shown["text"]
        assert ("uncertain" in shown["text"]) == (row["uncertain"] == "yes")
        bars = [a for _, a in shown["tags"] if a.get("class", "").startswith("bar")]
        assert len(bars) == (0 if row["error"] else 6)
        if bars:
            widths = [float(re.search(r"--p:([\d.]+)%", a["style"])[1]) for a in bars]
            assert widths == pytest.approx([100 * float(row[n]) for n in NAMES], abs=0.06)
            top = [a["class"] == "bar top" for a in bars]
            assert top == [n == row["predicted_class"] for n in NAMES]


def test_without_visualize_there_is_no_page(site, trained, tmp_path):
    """One of an earlier run would tell what is true no more."""
    folder, _ = site
    model = trained / "best_model.pth"
    classify(folder / CLIPS[1], model, tmp_path, "--visualize", "--workers", 1)
    assert (tmp_path / "report.html").exists()
    classify(folder / CLIPS[1], model, tmp_path)
    assert not (tmp_path / "report.html").exists()


# --------------------------------------------------------------------------------------
# 2,000 files


@pytest.fixture(scope="module")
def large(site, tmp_path_factory):
    """A page of 2,000 files, 200 of them mistakes; recordings and pictures are links to a few."""
    folder, out = site
    to = tmp_path_factory.mktemp("large")
    (to / "in").mkdir()
    (to / "out/mel_spectrograms").mkdir(parents=True)
    picture = next((out / "mel_spectrograms").glob("*.png"))
    random = np.random.default_rng(0)
    rows = []
    for i in range(2000):
        name = f"{1001 + i % 91}_{i:04d}.wav"
        os.link(folder / "take #3.wav", to / "in" / name)
        os.link(picture, to / "out/mel_spectrograms" / f"{name}.png")
        p = random.dirichlet(np.ones(6))
        top = NAMES[int(p.argmax())]
        row = {"file": name, "predicted_class": top, "confidence": f"{p.max():.6f}", "error": ""}
        row |= {n: f"{v:.6f}" for n, v in zip(NAMES, p, strict=True)}
        row["true_class"] = top if i % 10 else NAMES[(NAMES.index(top) + 1) % 6]
        rows.append(row | {"level_db": f"{6 * random.standard_normal():.2f}", "uncertain": ""})
    checkpoint = {"classes": [{"name": name} for name in NAMES]}
    started = time.perf_counter()
    tester.write_page(to / "out", to / "in", rows, checkpoint, [])
    seconds = time.perf_counter() - started
    size = (to / "out/report.html").stat().st_size / 1e6
    print(f"\n2,000 rows: page written in {seconds:.2f} s, {size:.1f} MB")
    return to / "out"


def test_a_page_of_2000_files_is_written(large):
    page = Page((large / "report.html").read_text(encoding="utf-8"))
    assert len(page.rows) == 2000
    assert [row.get("class") for row in page.rows[:201]] == ["wrong"] * 200 + [None]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert {image["loading"] for image in images} == {"lazy"}
    assert not any(tag == "audio" for tag, _ in page.tags), "players are made as rows are seen"


# --------------------------------------------------------------------------------------
# In a browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1200,900",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, with a profile of its own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if importlib.util.find_spec("selenium") is None or not program or not driver:
        pytest.skip("no selenium, chromium or chromedriver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    service = webdriver.ChromeService(driver)
    started = webdriver.Chrome(options=options, service=service)
    started.set_page_load_timeout(120)
    started.set_script_timeout(60)
    yield started
    started.quit()


def open_page(browser, out, width=1200, height=900, scheme="light"):
    """Opens a results folder's page at a size and in a colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get((out / "report.html").as_uri())


def column(browser, n):
    """The sort keys of a column of the rows that are shown, from top to bottom."""
    return browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')].filter(row => !row.hidden)"
        f".map(row => row.cells[{n}].dataset.v)"
    )


def visible_rows(browser):
    """Classes of the rows that are shown."""
    return browser.execute_script(
        "return [...document.querySelectorAll('tbody tr')]"
        ".filter(row => row.checkVisibility()).map(row => [row.dataset.class, row.className])"
    )


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def test_a_browser_runs_the_page_without_a_complaint(browser, site):
    open_page(browser, site[1])
    assert len(visible_rows(browser)) == len(CLIPS) + 1
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints


def test_a_browser_leaves_hostile_names_text(browser, site):
    from selenium.common.exceptions import NoAlertPresentException

    open_page(browser, site[1])
    time.sleep(0.5)  # an onerror fires once its image has failed
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    sources = browser.execute_script("return [...document.images].map(i => i.getAttribute('src'))")
    assert len(sources) == len(CLIPS)
    assert all(source.startswith("mel_spectrograms/") for source in sources)
    texts = browser.execute_script(
        "return [...document.querySelectorAll('td:first-child a')].map(a => a.textContent)"
    )
    assert sorted(texts) == sorted(readable(name) for name in (*CLIPS, FAILED))
    assert browser.execute_script("return document.scripts.length") == 1


@pytest.mark.parametrize(
    ("n", "title"), [(0, "Recording"), (2, "Answer"), (3, "Confidence"), (4, "Level")]
)
def test_a_browser_sorts_by_column_both_ways(browser, site, n, title):
    open_page(browser, site[1])
    [button] = [b for b in find(browser, "th button") if b.text.startswith(title)]
    head = find(browser, "th")[n]
    button.click()
    rising = column(browser, n)
    assert head.get_attribute("aria-sort") == "ascending"
    button.click()
    falling = column(browser, n)
    assert head.get_attribute("aria-sort") == "descending"
    assert sorted(rising) == sorted(falling)
    if title in ("Confidence", "Level"):
        numbers = [float(value) for value in rising if value]
        assert numbers == sorted(numbers)
        assert numbers != sorted(numbers, reverse=True)
        assert [float(value) for value in falling if value] == numbers[::-1]
        assert rising[0] == falling[-1] == "", "what failed has no number"
    elif title == "Answer":
        assert rising == sorted(rising)
        assert falling == rising[::-1]
    else:
        assert rising.index("1001_a.wav") + 1 == rising.index("1001_b.wav")
        assert rising.index("50% ?x=1.wav") < rising.index("1001_a.wav"), "numbers by value"
        plain = [name for name in rising if re.match(r"[a-z]", name)]
        assert plain == sorted(plain)
        assert falling == rising[::-1]


def test_a_browser_sorts_by_true_class(browser, site):
    open_page(browser, site[1])
    [button] = [b for b in find(browser, "th button") if b.text.startswith("True")]
    button.click()
    assert column(browser, 5) == sorted(column(browser, 5))
    button.click()
    assert column(browser, 5) == sorted(column(browser, 5), reverse=True)


def test_a_browser_goes_back_to_the_order_as_listed(browser, site):
    from selenium.webdriver.support.ui import Select

    open_page(browser, site[1])
    before = column(browser, 0)
    find(browser, "th button")[0].click()
    assert column(browser, 0) != before
    Select(find(browser, "#sort")[0]).select_by_visible_text("as listed")
    assert column(browser, 0) == before
    assert not find(browser, "th[aria-sort]"), "a head still says that the rows are sorted by it"


def test_a_browser_filters(browser, site):
    from selenium.webdriver.support.ui import Select

    open_page(browser, site[1])
    rows = read_table(site[1] / "classification_results.csv")
    filters = Select(find(browser, "#filter")[0])
    choices = [option.text for option in filters.options]
    assert choices == ["all", *NAMES, "mistakes", "failed"]
    for name in NAMES:
        filters.select_by_visible_text(name)
        expected = sum(row["predicted_class"] == name for row in rows)
        assert visible_rows(browser) == [r for r in visible_rows(browser) if r[0] == name]
        assert len(visible_rows(browser)) == expected
        assert find(browser, "#count")[0].text == f"{expected} shown"
    filters.select_by_visible_text("mistakes")
    assert [kind for _, kind in visible_rows(browser)] == ["wrong"] * 3
    assert find(browser, "#count")[0].text == "3 shown"
    filters.select_by_visible_text("failed")
    assert visible_rows(browser) == [["failed", ""]]
    filters.select_by_visible_text("all")
    assert len(visible_rows(browser)) == len(CLIPS) + 1


def test_a_browser_makes_players_as_rows_are_scrolled_to(browser, large):
    open_page(browser, large)
    wait_until(lambda: len(find(browser, "audio")) > 0)
    assert len(find(browser, "audio")) < 100
    row = "[...document.querySelectorAll('tbody tr')].at(-1)"
    browser.execute_script(f"{row}.scrollIntoView()")
    wait_until(lambda: browser.execute_script(f"return {row}.querySelector('audio') !== null"))
    source = browser.execute_script(f"return {row}.querySelector('audio').src")
    link = browser.execute_script(f"return {row}.querySelector('a').href")
    assert source == link
    assert url_to_path(source).is_file()
    assert len(find(browser, "audio")) < 200, "players are made for all rows at once"
    for where in ("document.body", row, "document.body", row):
        browser.execute_script(f"{where}.scrollIntoView()")
        time.sleep(0.3)
    n_players = f"return {row}.querySelectorAll('audio').length"
    assert browser.execute_script(n_players) == 1, "one more each time that a row is seen"


def url_to_path(url):
    """The file of a file:// URL."""
    raw = urllib.parse.unquote_to_bytes(urllib.parse.urlsplit(url).path)
    return Path(os.fsdecode(raw)).resolve()


def test_a_browser_plays_the_recordings(browser, site):
    """Also those with `#`, `?`, `%` and bytes that are no UTF-8 in their names."""
    open_page(browser, site[1], height=20000)
    wait_until(lambda: len(find(browser, "audio")) == len(CLIPS) - 1)  # not old.au's
    seconds = browser.execute_async_script(
        """
        const done = arguments[0], players = [...document.querySelectorAll("audio")];
        const length = player => new Promise(resolve => {
          player.onloadedmetadata = () => resolve([player.src, player.duration]);
          player.onerror = () => resolve([player.src, null]);
          player.preload = "metadata";
          player.load();
        });
        Promise.all(players.map(length)).then(done);
        """
    )
    assert len(seconds) == len(CLIPS) - 1
    for url, duration in seconds:
        path = url_to_path(url)
        assert path.is_file()
        if path.name == FAILED:
            assert duration is None
        else:
            expected = soundfile.info(os.fsencode(path)).duration
            assert duration == pytest.approx(expected, abs=0.05), path
    has_begun = browser.execute_async_script(
        """
        const done = arguments[0], player = document.querySelector("audio");
        player.muted = true;
        player.ontimeupdate = () => { if (player.currentTime > 0) done(true); };
        player.play().catch(error => done(String(error)));
        """
    )
    assert has_begun is True
    widths = browser.execute_async_script(
        """
        const done = arguments[0], images = [...document.images];
        Promise.all(images.map(i => i.decode().then(() => i.naturalWidth, () => 0))).then(done);
        """
    )
    assert min(widths) > 500, "a picture does not load"


def test_a_keyboard_alone_reaches_filter_and_sorting(browser, site):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    open_page(browser, site[1])

    def press(key):
        ActionChains(browser).send_keys(key).perform()

    def focused():
        return browser.switch_to.active_element

    def tab_to(is_wanted):
        for _ in range(20):
            press(Keys.TAB)
            if is_wanted(focused()):
                return
        pytest.fail("TAB does not come there")

    tab_to(lambda element: element.get_attribute("id") == "filter")
    press("m")  # mistakes
    assert len(visible_rows(browser)) == 3
    press("a")
    tab_to(lambda e: e.tag_name == "button" and e.text.startswith("Confidence"))
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "nobody sees where the keyboard stands"
    press(Keys.ENTER)
    rising = column(browser, 3)
    press(Keys.SPACE)
    assert column(browser, 3) == rising[::-1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(browser, site, scheme):
    from selenium.webdriver.support.ui import Select

    open_page(browser, site[1], width=400, height=20000, scheme=scheme)
    wait_until(lambda: len(find(browser, "audio")) == len(CLIPS) - 1)
    assert browser.execute_script("return innerWidth") == 400
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    right = browser.execute_script(
        "return Math.max(...[...document.body.querySelectorAll('*')]"
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 400
    Select(find(browser, "#filter")[0]).select_by_visible_text("mistakes")
    assert len(visible_rows(browser)) == 3, "the filter hides nothing on a phone"
    Select(find(browser, "#filter")[0]).select_by_visible_text("all")
    Select(find(browser, "#sort")[0]).select_by_visible_text("Confidence (%)")
    numbers = [float(value) for value in column(browser, 3) if value]
    assert numbers == sorted(numbers, reverse=True)


def luminance(colour):
    """WCAG's relative luminance of a CSS colour "rgb(r, g, b)"."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_is_readable_in_light_and_dark(browser, site):
    """WCAG's contrast of text on the page, at least 4.5."""
    grounds = []
    for scheme in ("light", "dark"):
        open_page(browser, site[1], scheme=scheme)
        text, ground = browser.execute_script(
            "const head = getComputedStyle(document.querySelector('th'));"
            "return [getComputedStyle(document.querySelector('td')).color, head.backgroundColor]"
        )
        dark, light = sorted((luminance(text), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ground)
        grounds.append(luminance(ground))
    assert grounds[0] > 0.8
    assert grounds[1] < 0.2


def memory_of(pid):
    """MB that a process and its children have to themselves, shared pages by their share."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(") ")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for member in family:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])
    return total / 1024


@pytest.mark.slow
def test_2000_files_sort_and_filter_in_a_browser(browser, large):
    """Prints how long it takes and how much memory; asserts what is shown, no figure."""
    browser.get("about:blank")
    before = memory_of(browser.service.process.pid)
    started = time.perf_counter()
    open_page(browser, large)
    loaded = time.perf_counter() - started
    timing = browser.execute_script(
        "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    )
    memory = memory_of(browser.service.process.pid) - before
    sort_ms = browser.execute_script(
        "const t = performance.now(); document.querySelectorAll('th button')[2].click();"
        "document.body.offsetHeight; return performance.now() - t"
    )
    numbers = [float(value) for value in column(browser, 3)]
    assert numbers == sorted(numbers)
    filter_ms = browser.execute_script(
        "const t = performance.now(), f = document.getElementById('filter'); f.value = 'wrong';"
        "f.dispatchEvent(new Event('change')); document.body.offsetHeight;"
        "return performance.now() - t"
    )
    assert [kind for _, kind in visible_rows(browser)] == ["wrong"] * 200
    browser.execute_script(
        "const f = document.getElementById('filter'); f.value = ''; f.dispatchEvent(new Event("
        "'change'));"
    )
    for share in np.linspace(0, 1, 21):  # somebody who scrolls through all of it
        browser.execute_script(f"scrollTo(0, {share} * document.documentElement.scrollHeight)")
        time.sleep(0.1)
    scrolled = memory_of(browser.service.process.pid) - before
    figures = {
        "load_s": round(loaded, 2),
        "load_event_ms": round(timing),
        "memory_mb": round(memory),
        "memory_scrolled_mb": round(scrolled),
        "sort_ms": round(sort_ms),
        "filter_ms": round(filter_ms),
        "players": len(find(browser, "audio")),
    }
    print(f"\n2,000 rows in chromium: {json.dumps(figures)}")
