"""report.html for every reader: by its marks, its colours, and in a browser where there is one."""
from __future__ import annotations

import html
import io
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.evaluation.page import STYLE, Drawing, Strip, page

VOID = {"meta", "img", "input", "br", "hr", "link", "source"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
                                                "chrome"))), None)
ROWS = [("real", ["real", "0.10"]), ("teacher", ["teacher:ddim", "–"]), ("student", ["<b>mine</b>", "2.5 [2.4, 2.6]"]),
        ("student", ["other", "10.0"])]


def png(width: int = 8) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (width, 8), "red").save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def text() -> str:
    strips = [Strip("real", 0, png()), Strip("mine, 1 NFE", 1, png()), Strip("mine, 4 NFE", 4, png())]
    return page("A title & more", "A note.", [Drawing("A curve", png(), png(20))], ["target", "FD"], ROWS, strips,
                {"id": "x"}, ["slow motion: mine"])


class Tree(HTMLParser):
    """Every element as (tag, attributes, tags that it lies in), and the texts of each kind of tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self.open)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, tag):
        return [attrs for name, attrs, _ in self.found if name == tag]

    def text_of(self, tag):
        return [data for name, data in self.texts if name == tag]


def test_headings_go_down_by_one(text):
    levels = [int(tag[1]) for tag, _, _ in Tree(text).found if re.fullmatch("h[1-6]", tag)]
    assert (levels[0] == 1 and levels.count(1) == 1
            and all(after - before <= 1 for before, after in zip(levels, levels[1:])))


def test_pictures_tables_and_buttons_say_what_they_are(text):
    tree = Tree(text)
    assert tree.of("html") == [{"lang": "en"}] and len(tree.of("main")) == len(tree.of("title")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tree.of("meta")
    assert len(tree.of("img")) == 4 and all(image["alt"] for image in tree.of("img"))
    assert (len(tree.of("table")) == len(tree.of("caption"))
            == len([1 for tag, _, within in tree.found if tag == "caption" and within[-1] == "table"]) == 2)
    assert all(head["scope"] in ("col", "row") for head in tree.of("th"))
    buttons = [within for tag, attrs, within in tree.found if tag == "button" and attrs["type"] == "button"]
    assert (len(buttons) == 2 and all(within[-1] == "th" for within in buttons)
            and tree.text_of("button") == ["target", "FD"])
    # a button has its own keys
    assert all("tabindex" not in attrs for attrs in tree.of("th")) and 'getAttribute("aria-sort")' in text
    slider, = tree.of("input")
    assert (slider["type"] == "range" and slider["aria-valuetext"] == "all"
            and [within[-1] for tag, _, within in tree.found if tag == "input"] == ["label"])
    regions = [attrs for attrs in tree.of("div") if attrs.get("role") == "region"]
    # what scrolls can be reached
    assert len(regions) == 2 and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)
    assert tree.text_of("li") == ["slow motion: mine"] and "<b>mine</b>" in "".join(tree.text_of("td"))


def test_nothing_is_fetched(text):
    tree = Tree(text)
    assert not tree.of("link") and not tree.of("iframe") and not tree.of("a") and "src" not in tree.of("script")[0]
    assert all(attrs["src"].startswith("data:image/png;base64,") for _, attrs, _ in tree.found if "src" in attrs)
    assert all(attrs["srcset"].startswith("data:image/png;base64,") for attrs in tree.of("source"))
    assert "http" not in text and "url(" not in text and "@import" not in text


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    parts = [int(part, 16) / 255 for part in (re.findall("..", digits) if len(digits) == 6
                                              else [2 * digit for digit in digits])]
    return sum(share * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
               for share, part in zip((0.2126, 0.7152, 0.0722), parts))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_is_that_of_wcag():
    assert (contrast("#fff", "#000") == pytest.approx(21) and contrast("#777777", "#fff")
            == pytest.approx(4.48, abs=0.01))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(scheme):
    blocks = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]
    assert len(blocks) == 2
    colours = blocks[0] | (blocks[1] if scheme == "dark" else {})
    used = set(re.findall(r"(?<!-)color: var\(--(\w+)\)", STYLE))
    # no text has a colour beside these
    assert used == {"ink", "faint", "real"} and not re.findall(r"(?<!-)color: #", STYLE)
    assert all(contrast(colours[name], colours["ground"]) >= 4.5 for name in used), (
        {n: contrast(colours[n], colours["ground"]) for n in used})


CLICK = """<script>
const button = document.querySelectorAll("th button")[1], head = button.parentElement;
const body = () => document.querySelector("tbody").textContent;
button.focus();
button.click();
const up = body(), first = head.ariaSort;
button.click();
const fits = document.documentElement.scrollWidth <= window.innerWidth;
document.title = [document.activeElement === button, first, head.ariaSort, up, body(), fits].join("|");
</script></body>"""
SLIDE = """<script>
const slider = document.querySelector("input[type=range]"), seen = [];
for (const place of [1, 2, 0]) {
  slider.value = place;
  slider.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("tr[data-nfe]")].filter(row => !row.hidden).map(row => row.dataset.nfe);
  seen.push(slider.getAttribute("aria-valuetext") + ": " + shown.join(" "));
}
document.title = seen.join("|");
</script></body>"""
WINDOWS = [(390, 844), (1440, 900)]
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here: the page is checked by its "
                                  "marks alone")


def browsed(text: str, folder: Path, window: tuple[int, int] = (400, 800), dark: bool = False) -> tuple[str, list[str]]:
    """The document after its scripts, and what they left on the console."""
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
                           f"--window-size={window[0]},{window[1]}", scheme, "--enable-logging=stderr", "--dump-dom",
                           file.as_uri()],
                          capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def title(shown: str) -> list[str]:
    return html.unescape(re.search("<title>(.*?)</title>", shown, re.DOTALL)[1]).split("|")


@in_a_browser
@pytest.mark.parametrize("window", WINDOWS, ids=["phone", "desktop"])
def test_a_table_sorts_in_a_browser(text, tmp_path: Path, window):
    shown, said = browsed(text.replace("</body>", CLICK), tmp_path, window)
    focused, first, second, up, down, fits = title(shown)
    assert (focused, first, second, fits, said) == ("true", "ascending", "descending", "true", [])
    assert (re.sub(r"\s", "", up).startswith("real0.10") and "other10.0" in down
            and down.index("other") < down.index("real"))


@in_a_browser
def test_the_slider_shows_the_pictures_of_one_count_beside_the_real_ones(text, tmp_path):
    shown, said = browsed(text.replace("</body>", SLIDE), tmp_path)
    assert title(shown) == ["1 network evaluations: 0 1", "4 network evaluations: 0 4", "all: 0 1 4"] and not said


@in_a_browser
@pytest.mark.parametrize("window, width", [(WINDOWS[0], "20"), (WINDOWS[1], "8")], ids=["phone", "desktop"])
def test_a_phone_is_shown_the_narrow_drawing(text, tmp_path, window, width):
    ask = "<script>onload = () => document.title = document.querySelector('picture img').naturalWidth</script></body>"
    shown, _ = browsed(text.replace("</body>", ask), tmp_path, window)
    assert title(shown) == [width]


AXE = os.environ.get("AXE")                 # axe.min.js of Deque's axe-core


@in_a_browser
@pytest.mark.skipif(AXE is None, reason="AXE names no axe.min.js (npm pack axe-core): no report is searched by it")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS, ids=["phone", "desktop"])
def test_axe_finds_nothing(text, tmp_path, window, dark):
    code = Path(AXE).read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    run = ("axe.run(document).then(found => document.title = "
           "[found.passes.length, ...found.violations.map(one => one.id)].join('|'))")
    shown, said = browsed(text.replace("</body>", f"<script>{code}</script><script>{run}</script></body>"), tmp_path,
                          window, dark)
    passed, *violations = title(shown)
    assert int(passed) > 10 and not violations and not said
