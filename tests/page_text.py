"""A page as a test sees it: its tags, its text in each language, and what is wrong with its structure."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "input", "wbr", "br", "img", "link"}
Attributes = dict[str, str]


class Page(HTMLParser):
    """Parses a page; `tags` are (name, attributes) in order, `faults` what does not fit together."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, Attributes]] = []
        self.faults: list[str] = []
        self.words: dict[str, list[str]] = {"en": [], "zh": []}  # of each text that there is in both languages
        self.shown: list[str] = []
        self._open: list[tuple[str, Attributes]] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{name}> is never closed" for name, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag in VOID:
            return
        self._open.append((tag, attributes))
        if attributes.get("class") in self.words:
            self.words[attributes["class"]].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.faults.append(f"</{tag}> at {self.getpos()} closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1][0] in ("script", "style"):
            return
        self.shown.append(data)
        for _, attributes in self._open:
            if attributes.get("class") in self.words:
                self.words[attributes["class"]][-1] += data

    @property
    def text(self) -> str:
        """All that can be read, in both languages."""
        return "".join(self.shown)

    def attributes(self, name: str) -> list[str]:
        """The values of an attribute, wherever it stands."""
        return [attributes[name] for _, attributes in self.tags if name in attributes]
