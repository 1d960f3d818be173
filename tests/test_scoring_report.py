"""The page: whole in one file, small for any number of rows, with nothing of the data run or read as markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pykd.command_line import main
from pykd.scoring.conditions import numbers_of
from pykd.scoring.report import as_html

LIMIT = 300_000


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def page_of(rows, classes, labels=True):
    rng = np.random.default_rng(0)
    teacher = 3 * rng.normal(size=(rows, classes))
    student = teacher + rng.normal(size=teacher.shape)
    np.save("teacher.npy", teacher.astype(np.float32))
    np.save("student.npy", student.astype(np.float32))
    call = ["score", "--teacher", "teacher.npy", "--student", "student.npy", "--out", "s.parquet"]
    call += ["--report", "report.html", "--json", "report.json"]
    if labels:
        np.save("labels.npy", rng.integers(0, classes, size=rows))
        call += ["--labels", "labels.npy"]
    assert main(call) == 0
    return Path("report.html").read_text(encoding="utf-8"), json.loads(Path("report.json").read_text(encoding="utf-8"))


class Reader(HTMLParser):
    """Every tag closed, every name once, nothing fetched; and the text."""

    VOID = {"meta", "br"}

    def __init__(self, page):
        super().__init__()
        self.open, self.names, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#"), value
            if name == "id":
                self.names.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        while self.open and self.open[-1] != tag:  # HTML closes some by itself
            assert self.open.pop() in ("li", "p", "tr", "td", "th"), tag
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize(("rows", "classes", "labels"), [(1, 2, True), (30, 3, False), (3000, 2000, True)])
def test_the_page_is_whole_and_small(rows, classes, labels):
    page, _ = page_of(rows, classes, labels)
    assert len(page.encode()) < LIMIT
    reader = Reader(page)
    assert not reader.open
    assert len(reader.names) == len(set(reader.names)), "pictures would find each other's parts"
    for name in re.findall(r"#([\w-]+)[\")]", page):
        assert name in reader.names, name
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_the_colours_are_the_pages():
    page, _ = page_of(200, 4)
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert pictures.count("<svg") == 4
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", pictures)
    for role in set(re.findall(r"var\((--\w+)\)", pictures)):
        assert page.count(f"{role}: #") == 2, f"{role}, light and dark"


def test_the_page_says_what_the_json_says():
    page, report = page_of(500, 20)
    text = " ".join(Reader(page).text)
    for score in report["scores"].values():
        for number in (score["mean"], score["quantiles"]["p50"], score["quantiles"]["p99.9"], score["maximum"]):
            assert f"{number:.4g}" in text
    for entry in report["worst_rows"]:
        assert f"{entry['kl']:.4g}" in text
    for entry in report["by_class"]["classes"]:
        assert f"{entry['mean']:.4g}" in text
    assert f"{report['agreement']['top1']['value']:.1%}" in text
    assert numbers_of(report)["kl.p99"] == report["scores"]["kl"]["quantiles"]["p99"]


def test_the_same_numbers_give_the_same_page():
    page, report = page_of(200, 4)
    assert as_html(report) == page


def test_names_are_text():
    _, report = page_of(50, 3)
    name = '<script>alert("1")</script>&amp;.npy'
    report["inputs"]["teacher"]["path"] = name
    page = as_html(report)
    assert "<script>" not in page
    assert name in "".join(Reader(page).text)


def test_bad_rows_stand_at_the_top():
    page_of(50, 3)
    teacher = np.load("teacher.npy")
    teacher[3, 0] = np.nan
    np.save("teacher.npy", teacher)
    assert (
        main(
            [
                "score",
                "--teacher",
                "teacher.npy",
                "--student",
                "student.npy",
                "--out",
                "s.parquet",
                "--report",
                "r.html",
            ]
        )
        == 0
    )
    text = " ".join("".join(Reader(Path("r.html").read_text()).text).split())
    assert "1 row is kept out of the numbers 1: NaN in the logits." in text
    np.save("teacher.npy", teacher * np.nan)
    assert (
        main(
            [
                "score",
                "--teacher",
                "teacher.npy",
                "--student",
                "student.npy",
                "--out",
                "s.parquet",
                "--report",
                "r.html",
            ]
        )
        == 0
    )
    assert "50 rows are kept out of the numbers" in Path("r.html").read_text()
