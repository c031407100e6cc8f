"""Formulas as MathML, which browsers draw themselves: no script, no network."""

import functools
import html
import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

# What the converter does not know, in words that it knows: after \\big and its like it takes characters, no commands.
TALL = re.compile(r"(\\[Bb]igg?[lr]?)\s*(\\\||\\\{|\\\}|\\[lr]?Vert|\\langle|\\rangle)")
CHARACTERS = {
    r"\|": "‖",
    r"\Vert": "‖",
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\{": "{",
    r"\}": "}",
    r"\langle": "⟨",
    r"\rangle": "⟩",
}
ARGUMENT = re.compile(r"\\arg(?![A-Za-z])")
# Only with braces does the converter take the letter of the alphabet; without, an attribute that browsers do not know.
LETTER = re.compile(r"\\(mathcal|mathbb|mathbf)\s*([A-Za-z])")
ONE = re.compile(r"\\(mathbb|mathbf)\s*(?:1|\{1\})")
ONES = dict(mathbb="𝟙", mathbf="𝟏")
LEFT = re.compile(r"\\(?:[A-Za-z]+|.)|<merror|mathvariant=\"(?!normal|italic)[a-z-]+\"")
THIN = "0.167em"
THICK = "0.278em"
RELATIONS = {"~": "∼", "⟹": "⟹", "⟶": "⟶", "⟺": "⟺", "±": "±", "⟂": "⟂", ":": ":"}
ORDINARY = "∞∅∂∇⊤∎…∃*"
TIGHT = "/|‖"
SIGNS = "−+-"
CLOSING = ")]}|‖⟩"
BELOW = ("min", "max", "lim", "sup", "inf")  # what is written under them stands below in display
# How many parts each of these has; the converter takes less.
PARTS = dict(mfrac=2, msub=2, msup=2, msubsup=3, munder=2, mover=2, munderover=3, mroot=2)
ACCENTS = ("\u00af", "^", "~")
FONT = "STIXTwoMath-Regular.ttf"


class FormulaError(ValueError):
    """A formula that has no MathML."""


@functools.cache
def mathml(latex: str, display: bool = False) -> str:
    """A formula as MathML.

    Errors      FormulaError for a formula that the converter refuses, that lacks a part, or of which a command is left
    """
    from latex2mathml import converter

    plain = TALL.sub(lambda match: match[1] + CHARACTERS[match[2]], latex.strip())
    plain = ARGUMENT.sub(r"\\operatorname{arg}", plain)
    plain = ONE.sub(lambda match: ONES[match[1]], plain)
    plain = LETTER.sub(r"\\\1{\2}", plain)
    try:
        drawn = converter.convert_to_element(plain, display="block" if display else "inline")
    except Exception as error:  # the converter has a dozen kinds, and IndexError besides
        raise FormulaError(
            f"expected a formula that can be drawn, got {latex.strip()!r} ({type(error).__name__})."
        ) from None
    _mend(drawn)
    short = [part.tag for part in drawn.iter() if len(part) < PARTS.get(part.tag, 0)]
    if short:
        raise FormulaError(
            f"expected a whole formula, got {latex.strip()!r}, where a {short[0]} lacks a part."
        )
    for part in drawn.iter():
        part.text = (
            html.unescape(part.text) if part.text else part.text
        )  # the converter's references
    text = tostring(drawn, encoding="unicode")
    left = LEFT.search(text)
    if left:
        raise FormulaError(
            f"expected a formula of known commands, got {latex.strip()!r}, of which {left[0]} is left as it is."
        )
    return text


# ---------------------------------------------------------------------------------------------------------------------
# What the converter gets almost right: each symbol as TeX sets it


def _mend(drawn: Element) -> None:
    """Give every symbol of a formula the kind and the space around it that TeX gives it."""
    for part in list(drawn.iter()):
        for symbol in part[:1] if part.tag == "mover" else part:  # an accent is no symbol
            _mend_symbol(symbol)
        _mend_scripts(part)
    for part in list(drawn.iter("mrow")):
        _mend_row(part)


def _mend_symbol(symbol: Element) -> None:
    text = _text(symbol)
    if text in RELATIONS:
        symbol.tag = "mo"
        symbol.text = RELATIONS[text]
        symbol.attrib |= dict(lspace=THICK, rspace=THICK)
    elif symbol.tag == "mo" and text in ORDINARY:
        symbol.tag = "mi"
    elif text == ";":
        symbol.tag = "mo"
        symbol.attrib |= dict(lspace="0em", rspace=THIN)
    elif symbol.tag == "mo" and (text in TIGHT or _is_function(symbol)):
        symbol.attrib |= dict(lspace="0em", rspace="0em")
        symbol.attrib.setdefault("stretchy", "false")
        if symbol.get("minsize"):  # the tall ones do stretch, to their size
            symbol.set("stretchy", "true")


def _mend_scripts(part: Element) -> None:
    """Limits below their operator, accents that stay as wide as they are, and tall brackets with an exponent."""
    if len(part) < 2:
        return
    if part[0].get("minsize"):  # browsers let an operator grow in a row only
        bracket = part[0]
        part[0] = Element("mrow")
        part[0].append(bracket)
    if part.tag == "mover" and part[1].tag == "mpadded":  # a long arrow and what stands above it
        part[0] = part[0][0]
        part[0].set("stretchy", "true")
        above = Element("mrow")
        space = Element("mspace", width=THICK)
        above.extend([space, part[1][0], space])
        part[1] = above
    if part.tag == "msub" and part[0].tag == "mo":
        if _text(part[0]) in BELOW or part[0].get("movablelimits"):
            part.tag = "munder"
            part[0].set("movablelimits", "true")
    if part.tag == "mover" and _text(part[1]) in ACCENTS:
        part.set("accent", "true")
        part[1].set("stretchy", "false")


def _mend_row(row: Element) -> None:
    """A thin space on both sides of log, max and their like, except at brackets; a minus after a relation is a sign."""
    parts = list(row)
    for before, part in pairwise([None, *parts]):
        if part.tag == "mo" and _text(part) in SIGNS and before is not None and _opens(before):
            part.set("form", "prefix")
    placed = []
    for i, part in enumerate(parts):
        if _is_function(part) and i > 0 and _is_letter(parts[i - 1]):
            placed.append(Element("mspace", width=THIN))
        placed.append(part)
        if _is_function(part) and i + 1 < len(parts) and _is_letter(parts[i + 1]):
            placed.append(Element("mspace", width=THIN))
    row[:] = placed


def _text(part: Element) -> str:
    return html.unescape(part.text or "") if len(part) == 0 else ""


def _is_function(part: Element) -> bool:
    """Whether a part is an operator of several letters, with or without something above or below it."""
    if part.tag in ("msub", "msup", "msubsup", "munder") and len(part):
        return _is_function(part[0])
    text = _text(part)
    return part.tag in ("mi", "mo") and len(text) > 1 and text.isalpha()


def _is_letter(part: Element) -> bool:
    """Whether a part is neither a symbol nor a space."""
    return part.tag not in ("mo", "mspace", "mtext")


def _opens(part: Element) -> bool:
    """Whether what follows a part begins anew: after a relation, a comma or an opening bracket."""
    return part.tag == "mo" and _text(part) not in CLOSING or part.tag == "mspace"


def font() -> Path:
    """The file of STIX Two Math, a font with the tables that formulas need. Errors: ImportError without ziamath."""
    package = importlib.util.find_spec("ziamath")  # not imported: it would read the font
    if package is None:
        raise ImportError(
            "expected the package ziamath, got none: `python3 -m lib lab` installs what is missing."
        )
    return Path(package.origin).parent / "fonts" / FONT
