"""What a page holds, read as a browser would."""

import base64
import io
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
from PIL import Image

_VOID = {"meta", "link", "br", "hr", "img", "input"}
_LOADS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


@dataclass
class Tag:
    """An element: its name, attributes and own text."""

    name: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """The elements of a page in order; refuses tags that are not closed."""

    html: str
    tags: list[Tag] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[Tag] = []
        self.feed(self.html)
        self.close()
        assert not self._open, f"never closed: {[tag.name for tag in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(self.tags[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop().name == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            tag.text += data

    def all(self, name: str, **attributes: str) -> list[Tag]:
        """Elements of a name, with `class_="..."` of a class."""
        wanted = attributes.pop("class_", None)
        return [
            tag
            for tag in self.tags
            if tag.name == name
            and (wanted is None or wanted in tag.attributes.get("class", "").split())
            and all(tag.attributes.get(key) == value for key, value in attributes.items())
        ]

    @property
    def references(self) -> list[str]:
        """Whatever elements refer to."""
        return [value for tag in self.tags for name, value in tag.attributes.items() if name in _LOADS]

    @property
    def ids(self) -> Counter[str]:
        """How often each id is given."""
        return Counter(tag.attributes["id"] for tag in self.tags if "id" in tag.attributes)

    def thumbnails(self) -> list[tuple[Tag, str]]:
        """Large thumbnails, in order, and the ids of their pictures."""
        return [
            (tag, next(use for use in self.tags[place:] if use.name == "use").attributes["href"].removeprefix("#"))
            for place, tag in enumerate(self.tags)
            if tag.name == "svg" and "thumb" in tag.attributes.get("class", "").split()
        ]

    def picture(self, name: str) -> np.ndarray:
        """Pixels of an embedded picture, uint8 (H, W, 3)."""
        (tag,) = self.all("image", id=name)
        kind, _, data = tag.attributes["href"].partition(";base64,")
        assert kind == "data:image/jpeg"
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
