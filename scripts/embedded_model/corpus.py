"""Builds the training text: six domains of permissive or public-domain prose, code and maths.

Everything comes from Debian packages, fetched by name with `apt-get download` into a cache outside
the repository and unpacked there with `dpkg -x`; nothing is installed system-wide by this script.
`diatheke` (the SWORD command line) must be installed: it reads the Spanish
Bible module.

Result: `<cache>/text/{train,heldout}.jsonl` with one document a line, and `sources.json` beside
them with the package versions, licences and bytes that the model card quotes.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from gzip import open as gzip_open
from html.parser import HTMLParser
from pathlib import Path

CACHE = Path.home() / ".cache" / "expertflow-corpus"
HELDOUT_SHARE = 0.025
DOMAIN_BYTES = 5_000_000
Reader = Callable[[Path], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """One package as a text source: which domain it feeds, and under which licence its text is."""

    domain: str
    package: str
    licence: str
    what: str
    read: Reader


def fetch(package: str, cache: Path) -> tuple[Path, str]:
    """Downloads and unpacks a Debian package once; returns its root and its version."""
    debs, root = cache / "debs", cache / "x" / package
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=debs, check=True)
    deb = next(debs.glob(f"{package}_*.deb"))
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", str(deb), "Version"], check=True, capture_output=True, text=True
    )
    return root, version.stdout.strip()


def tidy(text: str) -> str:
    """Normalises line ends and blank runs, so that layout does not eat the token budget."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def group(pieces: Iterator[str], size: int, joiner: str = "\n\n") -> Iterator[str]:
    """Joins small pieces into documents of about `size` characters, in their own order."""
    held: list[str] = []
    total = 0
    for piece in pieces:
        held.append(piece)
        total += len(piece)
        if total >= size:
            yield joiner.join(held)
            held, total = [], 0
    if held:
        yield joiner.join(held)


# ---- English prose -----------------------------------------------------------------------------


def r_strings(record: bytes) -> list[str]:
    """Character strings of one serialised R object, found by their XDR element headers.

    R marks each string as type 9 with an encoding bit; a scan for that header is enough for a data
    set that is nothing but one vector of lines, and spares a dependency.
    """
    out, at = [], 14
    while at + 8 <= len(record):
        flags, length = struct.unpack_from(">Ii", record, at)
        if flags & 0xFF == 9 and flags < 0x100000 and -1 <= length <= len(record) - at - 8:
            out.append(record[at + 8 : at + 8 + max(length, 0)].decode("utf-8", "replace"))
            at += 8 + max(length, 0)
        else:
            at += 4
    return out


def austen(root: Path) -> Iterator[str]:
    """Jane Austen's novels, chapter by chapter."""
    data = next(root.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    at = 0
    while at + 5 < len(data):
        try:
            stream = zlib.decompressobj()
            lines = r_strings(stream.decompress(data[at + 4 :]))
        except zlib.error:
            return
        at = len(data) - len(stream.unused_data)
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter) [\dIVXLC]+)", "\n".join(lines))
        for chapter in chapters if len(chapters) > 5 else []:
            body = re.sub(r"(?<=\S)\n(?=\S)", " ", chapter).replace("_", "")
            if len(body) > 1500:
                yield body


def verses(root: Path, module: str) -> Iterator[str]:
    """A Bible as plain paragraphs: verse numbers dropped, one document a chapter."""
    sword = next(root.rglob("share/sword"))
    command = ["diatheke", "-b", module, "-f", "plain", "-k", "Gen-Rev"]
    env = {**os.environ, "SWORD_PATH": str(sword)}
    run = subprocess.run(command, env=env, check=True, capture_output=True)
    chapters: dict[str, list[str]] = {}
    plain = re.sub(r" ?<[GH]\d+>", "", run.stdout.decode("utf-8", "replace"))
    for line in plain.splitlines():
        found = re.match(r"^(.+? \d+):\d+: (.*)$", line)
        if found and found[2].strip():
            chapters.setdefault(found[1], []).append(re.sub(r"\s+", " ", found[2]).strip())
    for lines in chapters.values():
        yield "\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4))


def jargon(root: Path) -> Iterator[str]:
    """The Jargon File: its essays and entries, without the bare lists of headwords."""
    with gzip_open(next(root.rglob("jargon.txt.gz")), "rt", encoding="utf-8") as file:
        paragraphs = re.split(r"\n\s*\n", file.read())
    flat = (re.sub(r"\s+", " ", part).strip() for part in paragraphs)
    yield from group((part for part in flat if len(part) > 60), 4000)


# ---- code and documentation --------------------------------------------------------------------


def python_files(root: Path) -> Iterator[str]:
    """Modules of the Python standard library, without tables and generated data."""
    skip = re.compile(r"/(test|tests|encodings|lib2to3|pydoc_data)/|_sysconfigdata|entities")
    for path in sorted(root.rglob("*.py")):
        if path.is_symlink() or skip.search(str(path)):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > 400:
            yield text


def sphinx_sources(root: Path) -> Iterator[str]:
    """The Python manual as written (reStructuredText), without change logs and credits."""
    skip = re.compile(r"changelog|acks|license|copyright|/data/")
    for path in sorted(root.rglob("_sources/**/*.rst.txt")):
        if not skip.search(str(path)):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield re.sub(r"^\.\. (index|module(author)?|sectionauthor)::.*\n", "", text, flags=re.M)


# ---- translated manuals ------------------------------------------------------------------------

BLOCKS = frozenset(
    [
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "li",
        "dt",
        "dd",
        "tr",
        "pre",
        "div",
        "table",
        "ul",
        "ol",
        "dl",
        "br",
    ]
)
SKIPPED = frozenset(["script", "style", "button", "svg", "head"])


class ManualText(HTMLParser):
    """Text of an Apache manual page: block tags become line breaks, page furniture is left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a block or a skipped element."""
        self.hidden += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n\n" if tag[0] in "ph" else "\n")

    def handle_endtag(self, tag: str) -> None:
        """Closes a block or a skipped element."""
        self.hidden -= tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keeps visible text; line breaks inside a paragraph are only layout."""
        if not self.hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def manual_page(page: str) -> str:
    """One manual page as text, from its heading to the comments box."""
    body = page.partition('id="page-content">')[2].partition('<div class="bottomlang">')[0]
    body = re.sub(r'<div class="toplang">.*?</div>', "", body, flags=re.S)
    body = re.sub(r'<div id="quickview">.*?</div>', "", body, flags=re.S)
    parser = ManualText()
    parser.feed(body)
    lines = (line.strip() for line in html.unescape("".join(parser.parts)).split("\n"))
    return "\n".join(line for line in lines if line)


def apache_manual(root: Path, language: str) -> Iterator[str]:
    """Pages of the Apache manual that really are in `language` (others fall back to English)."""
    mark = re.compile(rf'<html[^>]* lang="{language}"')
    skip = re.compile(r"/(index|directives|quickreference|sitemap)\.html$")  # half-translated lists
    for path in sorted(root.rglob(f"manual/{language}/**/*.html")):
        if skip.search(str(path)):
            continue
        raw = path.read_bytes()
        page = raw.decode("utf-8" if b"UTF-8" in raw[:600].upper() else "latin-1")
        if mark.search(page[:2000]):
            yield manual_page(page)


# ---- maths -------------------------------------------------------------------------------------


def metamath(root: Path) -> Iterator[str]:
    """Theorems of set.mm: each comment with its formal statement, proofs left out."""
    text = next(root.rglob("databases/set.mm")).read_text(encoding="utf-8", errors="replace")
    text = text.partition("$( Declare the primitive")[2] or text
    pattern = re.compile(r"\$\(((?:(?!\$\)).)*?)\$\)\s+([\w.-]+) \$[pa] (.*?) \$[=.]", re.S)
    yield from group((theorem(found) for found in pattern.finditer(text)), 6000)


def theorem(found: re.Match[str]) -> str:
    """One theorem as `name: comment` and its statement, without the comment's closing credits."""
    comment = re.sub(r"\s+", " ", found[1]).strip()
    comment = re.sub(
        r"\((Contributed|Revised|Proof shortened|New usage|Proof mod).*?\)", "", comment
    )
    comment = re.sub(r"~ ?|`", "", comment)
    comment, formula = (re.sub(r"\s+", " ", part).strip() for part in (comment, found[3]))
    return f"{found[2]}: {comment}\n{formula}"


SOURCES = (
    Source("english", "r-cran-janeaustenr", "public domain texts (package: MIT)",
           "Jane Austen, six novels", austen),
    Source("english", "jargon-text", "public domain", "The Jargon File", jargon),
    Source("code", "libpython3.11-stdlib", "PSF-2.0", "Python standard library", python_files),
    Source("docs", "python3.11-doc", "PSF-2.0", "Python manual sources", sphinx_sources),
    Source("french", "apache2-doc", "Apache-2.0", "Apache manual in French",
           lambda root: apache_manual(root, "fr")),
    Source("spanish", "sword-text-sparv", "public domain", "Reina-Valera Bible of 1909",
           lambda root: verses(root, "spaRV1909eb")),
    Source("spanish", "apache2-doc", "Apache-2.0", "Apache manual in Spanish",
           lambda root: apache_manual(root, "es")),
    Source("maths", "metamath-databases", "CC0-1.0", "set.mm: statements and comments", metamath),
)  # fmt: skip
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))


def digest(text: str) -> str:
    """Stable order and identity of a document."""
    return hashlib.sha256(text.encode()).hexdigest()


def documents(source: Source, root: Path, seen: set[str]) -> list[dict[str, str]]:
    """Tidied documents of one source, in a fixed shuffled order, without repeats."""
    out = []
    for text in map(tidy, source.read(root)):
        key = digest(text)
        if len(text) >= 300 and key not in seen:
            seen.add(key)
            out.append({"id": key[:12], "domain": source.domain, "source": source.package,
                        "text": text})  # fmt: skip
    return sorted(out, key=lambda document: document["id"])


def cap(found: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """The first documents of a source up to `limit` bytes."""
    out, total = [], 0
    for document in found:
        if total >= limit:
            break
        out.append(document)
        total += len(document["text"].encode())
    return out


def split(found: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and held-out documents of one source: whole documents, about 2.5 % of the bytes."""
    target = HELDOUT_SHARE * sum(len(document["text"]) for document in found)
    held: list[dict[str, str]] = []
    rest: list[dict[str, str]] = []
    total = 0
    for document in found:
        small = len(document["text"]) < 40_000
        if small and (total < target or len(held) < 4):
            held.append(document)
            total += len(document["text"])
        else:
            rest.append(document)
    return rest, held


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines, UTF-8."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def build(cache: Path) -> None:
    """Fetches every source, splits it and writes the two files and the table of sources."""
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    table: list[dict[str, str | int]] = []
    seen: set[str] = set()
    for source in SOURCES:
        root, version = fetch(source.package, cache)
        found = cap(documents(source, root, seen), DOMAIN_BYTES)
        rest, held = split(found)
        train += rest
        heldout += held
        table.append({"domain": source.domain, "package": source.package, "version": version,
                      "licence": source.licence, "what": source.what, "documents": len(found),
                      "train_bytes": sum(len(d["text"].encode()) for d in rest),
                      "heldout_bytes": sum(len(d["text"].encode()) for d in held)})  # fmt: skip
        print(table[-1], flush=True)
    target = cache / "text"
    target.mkdir(exist_ok=True)
    write_lines(target / "train.jsonl", train)
    write_lines(target / "heldout.jsonl", heldout)
    (target / "sources.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    build(parser.parse_args().cache)


if __name__ == "__main__":
    main()
