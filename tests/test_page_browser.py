"""The page in a real browser: nothing is wrong with it, nothing is loaded, and it fits where it is read."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from featherweight.artifact import Artifact, StoredUnit
from featherweight.artifact.write import to_bytes
from featherweight.layers import View
from featherweight.page import Front, Given, Measured, collect, html
from featherweight.page.given import Bench, Dense, Point, Timing
from featherweight.weights import Dense as Stored

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--enable-logging=stderr", "--v=0"]
OWN = re.compile(
    r"(https?://)?[\w.-]*\.(google|googleapis|gstatic|gvt1)\.com[:/].*"
)  # the browser asks for these by itself
LONG = "a_module_with_a_name." * 6 + "weight"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")


def full_page() -> str:
    """A page that has everything, with long names and many weights."""
    names = [LONG, *(f"layer{i}.weight" for i in range(60))]
    units = tuple(
        StoredUnit((n,), View((9, 16)), Stored(torch.ones(9, 16).half()), f"method {n}", 0.01 * i, "a note")
        for i, n in enumerate(names)
    )
    about = {"model": f"net.py:{LONG}", "settings": {"target": "10kB", "data": f"net.py:{LONG}"}}
    about |= {"left_alone": {"a reason": ["bias", LONG + "2"]}}
    artifact = Artifact(units, {"bias": torch.ones(3, 3), LONG + "2": torch.ones(2, 2)}, (), about)
    data, metrics = to_bytes(artifact), {"top1": 91.5, "top5": 99.0, "a metric of mine": 0.1234}
    plain = {name: {k: v - 1 - i for k, v in metrics.items()} for i, name in enumerate(("half", "int8", "int4"))}
    points = tuple(Point(900 * 2**i, 0.1, 0.1, {"top1": 85.0 + i}) for i in range(7))
    times = tuple(Timing("onnxruntime", w, 1, 1.5, 1.4, 1.7, 1.0) for w in ("dense fp32", "ours", "quantize_static"))
    given = Given(
        None,
        Front(Dense(10**6, metrics), points[3], points),
        Bench(len(data), 2, times, {LONG: LONG}, ("it is small, but not faster",)),
    )
    return html(
        collect("small.fw", artifact, data, given, Measured(metrics, metrics, plain, {LONG: (9, 3)}, (10**7, 10**6)))
    )


FRAME = """<!doctype html><title>frame</title><body style="margin:0">
<iframe src="/page.html" style="border:0;width:360px;height:800px"></iframe>
<script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const inside = e => e.closest(".wide") !== null && !e.classList.contains("wide");
  const beyond = [...page.querySelectorAll("main *, header *")].filter(
    e => !inside(e) && (e.getBoundingClientRect().right > 360.5 || e.getBoundingClientRect().left < -0.5));
  document.body.dataset.width = page.documentElement.scrollWidth;
  document.body.dataset.beyond = beyond.map(e => `${e.tagName}.${e.getAttribute("class")}`).join(" ");
};
</script>"""


class Site:
    """Serves pages and stands in for the rest of the world: as a proxy it sees every request, and lets none out."""

    def __init__(self, pages: dict[str, str]) -> None:
        self.seen: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append(self.path)
                body = pages.get(self.path.removeprefix(f"http://127.0.0.1:{site.port}"), "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_CONNECT(self) -> None:
                site.seen.append(self.path)
                self.send_error(502)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def asked(self) -> list[str]:
        """What pages asked for."""
        return [path for path in self.seen if not OWN.fullmatch(path)]

    def open(self, path: str, folder: Path, *options: str) -> tuple[str, list[str]]:
        """What the browser prints, and what it complains of, on the page at `path`."""
        own = [f"--user-data-dir={folder / 'profile'}", f"--proxy-server=127.0.0.1:{self.port}"]
        own += ["--proxy-bypass-list=<-loopback>", *options, f"http://127.0.0.1:{self.port}{path}"]
        assert BROWSER is not None
        done = subprocess.run([BROWSER, *FLAGS, *own], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page() -> str:
    return full_page()


@pytest.fixture
def site(page) -> Iterator[Site]:
    broken = page.replace("<main>", '<main><p style="color: red"><img alt="" src="http://elsewhere.test/x.png">')
    loose = re.sub("<meta http-equiv[^>]*>", "", broken)
    found = Site({"/page.html": page, "/frame.html": FRAME, "/broken.html": broken, "/loose.html": loose})
    yield found
    found.server.shutdown()
    found.server.server_close()


SIGHTS = {
    "light": (["--window-size=1000,1400"], (253, 253, 252)),
    "dark": (["--window-size=1000,1400", "--blink-settings=preferredColorScheme=0"], (19, 21, 25)),
    "phone": (["--window-size=360,1400"], (253, 253, 252)),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_it_is_drawn_without_a_complaint_or_a_request(site, tmp_path, sight):
    options, paper = SIGHTS[sight]
    picture = tmp_path / "page.png"
    _, complaints = site.open("/page.html", tmp_path, *options, f"--screenshot={picture}")
    assert complaints == []
    assert site.asked == [f"http://127.0.0.1:{site.port}/page.html"]
    with Image.open(picture) as drawn:
        pixels = drawn.convert("RGB")
        assert pixels.getpixel((2, 2)) == paper
        colours = pixels.getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 50  # there is something on it


def test_it_fits_a_phone(site, tmp_path):
    printed, complaints = site.open("/frame.html", tmp_path, "--window-size=600,900", "--dump-dom")
    assert complaints == []
    assert re.search(r'data-width="(\d+)"', printed)[1] == "360"  # pyright: ignore[reportOptionalSubscript]
    assert 'data-beyond=""' in printed, re.search(r'data-beyond="([^"]*)"', printed)


def test_what_would_be_wrong_is_seen(site, tmp_path):
    """These tests can fail: a page with a style of its own and a picture from elsewhere is complained of, and without
    its policy it asks for the picture."""
    _, complaints = site.open("/broken.html", tmp_path, "--dump-dom")
    assert any("style" in line for line in complaints)
    assert any("elsewhere.test" in line for line in complaints)
    assert len(site.asked) == 1
    site.open("/loose.html", tmp_path, "--dump-dom")
    assert "http://elsewhere.test/x.png" in site.asked
