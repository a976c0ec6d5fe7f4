"""Markdown and the self-contained page: pictures are inside, and what data sets are called cannot become markup."""

import base64
from html.parser import HTMLParser

import pytest

from mmei_jax.reports.page import Picture, Section, to_html, to_markdown
from mmei_jax.reports.tables import escaped, markdown_table

PNG = b"\x89PNG\r\n\x1a\n and so on"
NASTY = "<script>alert(1)</script> *a* _b_ [c](d) `e` |f| be_entertained $g$ & \\"


class Collector(HTMLParser):
    """Tags with attributes, and the text of the page without its style."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(page):
    collector = Collector()
    collector.feed(page)
    return collector.tags, "".join(collector.text)


def make_markdown():
    rows = [[escaped(NASTY), "0.5"]]
    picture = Picture("curve.png", escaped("Loss of class *x*."), PNG)
    return to_markdown(
        "A report", [Section("", ["First."]), Section("Loss", [picture, markdown_table(["a", "b"], rows)])]
    )


def test_page_holds_every_picture_and_refers_to_nothing_outside():
    tags, _ = read(to_html(make_markdown(), {"curve.png": PNG}))
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    assert image["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert image["alt"] == "Loss of class *x*."
    assert not [tag for tag, _ in tags if tag in ("link", "script", "iframe")]
    addresses = [attributes[name] for _, attributes in tags for name in ("src", "href") if name in attributes]
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_markdown_refers_to_pictures_by_file_name():
    assert "](curve.png)" in make_markdown()


def test_names_are_shown_as_they_are_and_never_read_as_markup():
    tags, text = read(to_html(make_markdown(), {"curve.png": PNG}))
    assert NASTY in text
    (row,) = [line for line in make_markdown().splitlines() if "script" in line]
    assert row.endswith("| 0.5 |")
    assert [tag for tag, _ in tags].count("td") == 2


def test_navigation_links_every_section():
    tags, _ = read(to_html(make_markdown(), {"curve.png": PNG}))
    links = [attributes["href"].removeprefix("#") for tag, attributes in tags if tag == "a"]
    assert links == ["loss"]
    assert [attributes.get("id") for tag, attributes in tags if tag == "h2"] == links


@pytest.mark.parametrize("text", ["be_entertained", "two words", "emotion/f1_of_macro", "hr@10"])
def test_ordinary_names_need_no_escapes(text):
    assert escaped(text) == text
