"""What the panel says: every text in every language of the front end's that it speaks, and none without a language."""

import re
from pathlib import Path

import pytest

TASTE = Path(__file__).parents[2] / "web" / "taste"
SOURCES = [TASTE.parent / "prefgen.js", *(path for path in sorted(TASTE.glob("*.js")) if "texts" not in path.name)]
LANGUAGES = sorted(path.name.split(".")[1] for path in TASTE.glob("texts.*.js"))
STRING = r'"((?:[^"\\]|\\.)*)"'
# Texts that stand in a table and are translated where it is read.
TABLES = re.compile(r"const (?:TABS|SIDES|HELP) = (\{.*?\});", re.S)


def asked() -> set[str]:
    """Every text that t() is called with."""
    texts = set()
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        texts |= set(re.findall(rf"\bt\({STRING}", source))
        for table in TABLES.findall(source):
            texts |= set(re.findall(rf"\w+: {STRING}", table))
    return texts


def translated(language: str) -> dict[str, str]:
    source = (TASTE / f"texts.{language}.js").read_text(encoding="utf-8")
    pairs = re.findall(rf"^  (?:{STRING}|(\w+)):\s+{STRING},$", source, re.M)
    return {quoted or bare: text for quoted, bare, text in pairs}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_lacks_no_text_and_keeps_no_old_one(language):
    texts = translated(language)
    assert set(texts) == asked()
    for english, other in texts.items():
        assert other and other != english
        assert set(re.findall(r"\{\w+\}", other)) == set(re.findall(r"\{\w+\}", english)), english


def test_chinese_is_among_them():
    assert "zh" in LANGUAGES and len(asked()) > 80


def test_nothing_is_shown_without_being_translated():
    """Attributes that are read aloud or shown, and messages, are given by t()."""
    shown = rf'(?:"aria-label"|title|placeholder|label|content|tooltip): {STRING}|new Error\({STRING}|\bsay\({STRING}'
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        assert not re.findall(shown, source), path.name
        assert not re.findall(rf"iconButton\({STRING}, {STRING}", source), path.name
