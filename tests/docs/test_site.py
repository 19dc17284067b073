"""The site builds without warnings or network, includes the API reference, and shows all tables in full."""

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import dali_llava.modeling
import dali_llava.processing
import dali_llava.train.losses


ROOT = Path(__file__).parents[2]
WIDTH = 1280  # pixels of the window
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Opens each page in a frame of WIDTH pixels and reports for each table whether it fits into its container.
MEASURE = """<body><script>
const pages = PAGES, found = {};
let left = pages.length;
for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width: WIDTHpx; height: 900px";
  frame.src = page;
  frame.onload = () => setTimeout(() => {
    const inner = frame.contentDocument;
    const limit = inner.querySelector(".md-content__inner").getBoundingClientRect().right + 1;
    found[page] = [...inner.querySelectorAll(".md-content table")].map(table => {
      const holder = (table.closest(".md-typeset__table") || table).parentElement;
      const fits = table.getBoundingClientRect().right <= limit && holder.scrollWidth <= holder.clientWidth + 1;
      return [table.rows[0].innerText, fits];
    });
    if (--left == 0) {
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify(found);
      document.body.append(result);
    }
  }, 500);
  document.body.append(frame);
}
</script></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs", reason="mkdocs, of the dev extra, is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    for page in (ROOT / "docs").glob("**/*.md"):
        folder = page.relative_to(ROOT / "docs").with_suffix("")
        folder = folder.parent if page.stem == "index" else folder
        assert (site / folder / "index.html").is_file()


def test_the_site_loads_nothing_from_the_network(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link rel=\"?(?:stylesheet|preconnect))[^>]*>", page.read_text())
        assert tags and not [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)]


def test_the_reference_has_every_public_class(site):
    for module, page, names in (
        (dali_llava.modeling, "modeling", dali_llava.modeling.__all__),
        (dali_llava.processing, "processing", ("LlavaAudioProcessor", "LlavaAudioFeatureExtractor")),
        (dali_llava.train.losses, "losses", [each for each in dali_llava.train.losses.__all__ if each != "LOSSES"]),
    ):
        text = (site / "api" / page / "index.html").read_text()
        assert [name for name in names if f'id="{module.__name__}.{name}"' not in text] == []


def test_the_reference_has_the_help_of_arguments_and_no_markup_of_docstrings(site):
    trainers = (site / "api" / "trainers" / "index.html").read_text()
    assert "Folder or Hub id of the model to start from" in trainers
    for page in (site / "api").glob("*/index.html"):
        assert "*optional*" not in page.read_text() and "[<code>" not in page.read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium, which measures the pages, is not installed")
def test_no_table_is_cut_off(site, tmp_path):
    pages = [page.relative_to(site).as_posix() for page in sorted(site.rglob("index.html"))]
    (site / "measure.html").write_text(MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(WIDTH)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        *quiet,
        f"--user-data-dir={tmp_path}",
        f"--window-size={WIDTH},900",
    ]
    address = f"http://127.0.0.1:{server.server_port}/measure.html"
    done = subprocess.run(
        [*command, "--virtual-time-budget=60000", "--dump-dom", address], capture_output=True, text=True, timeout=300
    )
    server.shutdown()
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)[1]))
    assert sorted(found) == pages and sum(map(len, found.values())) > 50
    assert [(page, row) for page, tables in found.items() for row, fits in tables if not fits] == []


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
