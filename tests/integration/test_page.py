"""report.html: what stands in it, that it needs nothing else, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import ricciq

from ricciq.report.schema import load_report
from ricciq.runs.folder import RunFolder
from ricciq.system.tables import read_csv, write_csv

pytestmark = pytest.mark.slow

JOB = ["quantize", "digits_resnet8", "--data", "digits", "--bits", "auto:2.5", "--epochs", "2"]
SECTIONS = {
    "verdict",
    "training",
    "layers",
    "sensitivity",
    "geometry",
    "disagreements",
    "recipe",
}


@pytest.fixture(scope="session")
def run(run_once: Callable[..., Path]) -> RunFolder:
    """A run that has everything a page can show."""
    return RunFolder(run_once("page", *JOB, "--lr", "0.05"))  # bad enough to disagree


@pytest.fixture
def copied(run: RunFolder, tmp_path: Path) -> RunFolder:
    """The same, to be damaged."""
    shutil.copytree(run.path, tmp_path / "copied")
    return RunFolder(tmp_path / "copied")


class Elements(HTMLParser):
    """The start tags of a page, each with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_page_has_every_section_and_the_figures_of_the_report(run: RunFolder) -> None:
    page = run.page.read_text()
    tags = Elements(page).tags
    assert {values.get("id") for tag, values in tags if tag == "section"} == SECTIONS
    assert sum(tag == "svg" for tag, _ in tags) == 5
    report = load_report(run.report)
    assert f"{report.onnx.top1:.2f} %" in page
    assert f"{1 / report.size.ratio:.1f} times" in page
    for layer in report.layers:
        assert f">{layer.name}<" in page
    assert html.escape(run.recipe.read_text(), quote=False) in html.unescape(page)
    assert f"--recipe {shlex.quote(str(run.recipe))}" in html.unescape(page)


def test_a_page_needs_no_other_file_and_runs_nothing(run: RunFolder) -> None:
    page = run.page.read_text()
    for tag, values in Elements(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in values)
        for name in ("src", "href", "xlink:href"):
            assert str(values.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_examples_are_pictures_the_two_models_answer_differently(run: RunFolder) -> None:
    found = json.loads(run.disagreements.read_text())
    report = load_report(run.report)
    assert report.onnx.float_agreement == pytest.approx(100 * (1 - found["count"] / 360))
    assert 0 < len(found["examples"]) <= min(found["count"], 12)
    shares = [example["onnx_share"] for example in found["examples"]]
    assert shares == sorted(shares, reverse=True)
    for example in found["examples"]:
        assert example["float_guess"] != example["onnx_guess"]
        assert example["png"] in run.page.read_text()


def test_evaluation_counts_the_same_disagreements(run: RunFolder) -> None:
    line = ["eval", run.onnx, "--reference", run.float_onnx, "--data", "digits", "--json"]
    report = load_report(run.report)
    assert json.loads(ricciq(*line).out)["agreement"] == pytest.approx(report.onnx.float_agreement)


def test_report_writes_the_same_pages_again(run: RunFolder, copied: RunFolder) -> None:
    before = copied.report_markdown.read_text(), copied.page.read_text()
    copied.page.unlink()
    copied.report_markdown.unlink()
    answer = ricciq("report", copied.path, "--dry-run", "--json")
    assert answer.code == 0
    assert not copied.page.exists()
    pages = [str(copied.report_markdown), str(copied.page)]
    assert json.loads(answer.out) == {"pages": pages, "dry_run": True}
    assert json.loads(ricciq("report", copied.path, "--json").out) == {"pages": pages}
    again = copied.report_markdown.read_text(), copied.page.read_text()
    assert again[0] == before[0]
    lines = [
        html.unescape(page).replace(f"--recipe {shlex.quote(str(folder.recipe))}", "")
        for page, folder in ((before[1], run), (again[1], copied))
    ]
    assert lines[0] == lines[1]


def test_names_out_of_files_are_no_markup(copied: RunFolder) -> None:
    evil = "<script>alert(1)</script>"
    report = json.loads(copied.report.read_text())
    report["model"] = report["data"] = report["layers"][0]["name"] = report["messages"] = evil
    report["messages"] = [evil]
    copied.report.write_text(json.dumps(report))
    for path in (copied.geometry, copied.decay, copied.sensitivity, copied.recipe):
        path.write_text(path.read_text().replace("conv1", evil).replace("digits", evil))
    found = json.loads(copied.disagreements.read_text())
    found["examples"][0] |= {"label": evil, "png": f'"{evil}', "onnx_guess": evil}
    copied.disagreements.write_text(json.dumps(found))
    assert ricciq("report", copied.path).code == 0
    assert not any(tag == "script" for tag, _ in Elements(copied.page.read_text()).tags)


@pytest.mark.parametrize("name", ["geometry", "decay", "sensitivity", "summary", "disagreements"])
@pytest.mark.parametrize("content", [b"garbage\n1,2\n", b"\xff\xfe\x00", b"epoch,layer\nx,y\n"])
def test_damaged_tables_are_named_and_nothing_is_written(
    copied: RunFolder, name: str, content: bytes
) -> None:
    before = copied.page.read_bytes()
    getattr(copied, name).write_bytes(content)
    answer = ricciq("report", copied.path)
    assert answer.code == 3, answer.err
    assert str(copied.path) in answer.err
    assert len(answer.err.splitlines()) == 1
    assert copied.page.read_bytes() == before


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("size", "ratio", 0),
        ("latency", "speedup", 0),
        ("geometry", "perturbation_start", None),
        ("geometry", "mismatch_cosine", None),
    ],
)
def test_a_report_with_numbers_that_cannot_be_is_refused(
    copied: RunFolder, part: str, key: str, value: float | None
) -> None:
    report = json.loads(copied.report.read_text())
    report[part][key] = value
    copied.report.write_text(json.dumps(report))
    answer = ricciq("report", copied.path)
    assert (answer.code, len(answer.err.splitlines())) == (3, 1), answer.err


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("decay", "time", "-1e300"),
        ("summary", "epoch", "1" + "0" * 400),
        ("geometry", "epoch", "1" + "0" * 400),
    ],
)
def test_tables_with_numbers_beyond_all_bounds_are_refused(
    copied: RunFolder, name: str, column: str, value: str
) -> None:
    rows = read_csv(getattr(copied, name))
    write_csv(getattr(copied, name), [{**row, column: value} for row in rows])
    answer = ricciq("report", copied.path)
    assert (answer.code, len(answer.err.splitlines())) == (3, 1), answer.err


def test_a_page_of_many_layers_and_epochs_stays_small(copied: RunFolder) -> None:
    rows = read_csv(copied.geometry)[:1]
    many = [{**rows[0], "epoch": e, "layer": f"layer{n}"} for n in range(60) for e in range(1, 101)]
    write_csv(copied.geometry, many)
    assert ricciq("report", copied.path).code == 0
    assert copied.page.stat().st_size < 1_500_000


def test_an_old_run_without_the_newer_files_has_a_page(copied: RunFolder) -> None:
    for path in (copied.decay, copied.disagreements, copied.sensitivity):
        path.unlink()
    report = json.loads(copied.report.read_text())
    del report["onnx"]["float_agreement"]
    copied.report.write_text(json.dumps(report))
    assert ricciq("report", copied.path).code == 0
    assert "did not record it" in copied.page.read_text()


def test_what_is_no_finished_run_has_no_page(copied: RunFolder, tmp_path: Path) -> None:
    copied.report.unlink()
    for path in (copied.path, tmp_path / "none"):
        answer = ricciq("report", path)
        assert answer.code == 3
        assert "give a finished run" in answer.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags", [["--bits", "32", "--epochs", "1"], ["--bits", "8", "--epochs", "0"]]
)
def test_runs_without_layers_or_training_have_pages(
    digits_run: Callable[..., Path], flags: list[str]
) -> None:
    page = (digits_run(*flags) / "report.html").read_text()
    assert ("<p>None: the model was only calibrated.</p>" in page) == ("0" in flags)
    assert ("<p>No layer is discrete.</p>" in page) == ("32" in flags)
    assert "None %" not in page


# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# Shows the page in a frame of a phone's or a desk's width, and writes what it found below it.
LOOK = """
<iframe id="frame" style="border:0" width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("frame").onload = () => {{
  const page = document.getElementById("frame").contentDocument;
  const lines = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {{
    if (!walker.currentNode.data.trim()) continue;
    const range = page.createRange();
    range.selectNodeContents(walker.currentNode);
    // A turned text's rectangle is of its turned box; tables wider than the page scroll in a box.
    const clip = walker.currentNode.parentElement.closest(".scroll")?.getBoundingClientRect();
    for (const r of range.getClientRects()) {{
      if (clip && r.right > clip.right + 1) continue;
      lines.push([walker.currentNode.data.trim(), r.left, r.top, r.right, r.bottom]);
    }}
  }}
  const overlaps = [];
  for (let i = 0; i < lines.length; i++) for (let j = 0; j < i; j++) {{
    const [a, l, t, r, b] = lines[i], [c, l2, t2, r2, b2] = lines[j];
    const wide = Math.min(r, r2) - Math.max(l, l2), high = Math.min(b, b2) - Math.max(t, t2);
    // Boxes of lines are a little higher than their letters.
    if (wide > 1 && high > 0.4 * Math.min(b - t, b2 - t2)) overlaps.push([c, a]);
  }}
  document.getElementById("found").textContent = JSON.stringify({{
    texts: lines.length,
    overlaps,
    width: page.documentElement.scrollWidth,
    small: [...page.querySelectorAll("svg")].filter(s => s.clientWidth < 250).length,
    broken: [...page.images].filter(i => !i.naturalWidth).length,
    sections: [...page.querySelectorAll("section")].filter(s => s.offsetHeight > 20).map(s => s.id),
    background: getComputedStyle(page.body).backgroundColor,
    ink: getComputedStyle(page.body).color,
  }});
}};
</script>
"""


def look(page: Path, width: int, scratch: Path, *flags: str) -> dict[str, object]:
    """What a browser shows of a page at a width in pixels."""
    assert BROWSER
    frame = scratch / "frame.html"
    frame.write_text(LOOK.format(width=width, page=html.escape(page.read_text())))
    profile = f"--user-data-dir={scratch / 'profile'}"
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", profile, *flags]
    line += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="found">(.+?)</pre>', shown, re.DOTALL)
    assert found, shown[-500:]
    values: dict[str, object] = json.loads(html.unescape(found[1]))
    return values


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_a_whole_page_without_overlapping_text(
    run: RunFolder, tmp_path: Path, width: int
) -> None:
    found = look(run.page, width, tmp_path)
    assert set(found["sections"]) == SECTIONS
    assert found["texts"] > 200
    assert found["overlaps"] == []
    assert found["width"] <= width
    assert found["broken"] == found["small"] == 0


@pytest.mark.browser
@needs_browser
def test_the_check_for_overlaps_finds_them(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<body><p>one</p><p style='margin-top:-2em'>two</p></body>")
    assert look(page, 390, tmp_path)["overlaps"] == [["one", "two"]]


@pytest.mark.browser
@needs_browser
def test_a_page_is_dark_where_the_reader_wants_it_so(run: RunFolder, tmp_path: Path) -> None:
    light = look(run.page, 390, tmp_path)
    dark = look(run.page, 390, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["background"] != dark["background"]
    assert light["ink"] != dark["ink"]


@pytest.mark.browser
@needs_browser
def test_a_page_prints(run: RunFolder, tmp_path: Path) -> None:
    assert BROWSER
    target = tmp_path / "page.pdf"
    line = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
    line += [f"--print-to-pdf={target}", run.page.as_uri()]
    subprocess.run(line, capture_output=True, timeout=120, check=True)
    assert target.read_bytes().startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))
    assert 2 <= pages <= 12


def test_the_page_calls_a_flow_that_did_not_act_a_probe(run: RunFolder) -> None:
    assert load_report(run.report).geometry.applied is False  # the default corrects activations
    page = run.page.read_text(encoding="utf-8")
    assert "Geometry: a probe" in page
    assert "a probe, not applied in training" in page
