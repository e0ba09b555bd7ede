"""Rule-based rewording of English questions and answers: deterministic, offline, and weak.

What the rules do: swap about fifty function phrases, wrap or unwrap question frames, contract or expand negations, and
move a leading or trailing clause. What they do not do: understand a sentence. They know no grammar beyond the patterns
below, they keep the words that carry the fact, and a short answer ("Paris") comes back as it was. A model that
withstands these rewordings has withstood little; real paraphrases belong in the data.

Names, numbers and quoted titles are never touched: rules match lower-case words only, and quoted or emphasised spans
are set aside first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_SWAPS: dict[str, tuple[str, ...]] = {
    "full name": ("complete name",),
    "author": ("writer",),
    "profession": ("occupation",),
    "is known for": ("is noted for", "is recognised for"),
    "was known for": ("was noted for", "was recognised for"),
    "known as": ("referred to as",),
    "such as": ("like",),
    "in order to": ("so as to",),
    "because of": ("owing to", "on account of"),
    "due to": ("owing to",),
    "as well as": ("along with",),
    "located in": ("situated in",),
    "contributed to": ("played a part in",),
    "was born in": ("came into the world in",),
    "was born on": ("came into the world on",),
    "passed away": ("died",),
    "also": ("likewise",),
    "often": ("frequently",),
    "frequently": ("often",),
    "primarily": ("mainly",),
    "mainly": ("primarily",),
    "usually": ("generally",),
    "many": ("a great many",),
    "several": ("a number of",),
    "various": ("a variety of",),
    "famous": ("well-known",),
    "important": ("significant",),
    "significant": ("important",),
    "is named": ("is called", "goes by the name of"),
    "is called": ("is named", "goes by the name of"),
    "works as": ("earns a living as",),
    "lives in": ("resides in", "has a home in"),
    "grew up in": ("spent a childhood in",),
    "is based on": ("rests on",),
    "such a": ("this kind of",),
    "well known": ("widely known",),
    "renowned": ("celebrated",),
    "unique": ("distinctive",),
    "influenced": ("shaped",),
    "in addition to": ("besides",),
    "through": ("by way of",),
    "a member of": ("one of the members of",),
    "wrote": ("authored",),
    "written by": ("authored by",),
    "published": ("released",),
    "began": ("started",),
    "began to": ("started to",),
    "although": ("even though",),
    "however": ("that said",),
    "during": ("in the course of",),
    "believes that": ("holds that",),
    "explores": ("examines",),
    "shows": ("demonstrates",),
    "uses": ("makes use of",),
    "received": ("was given",),
}
_NO_ARTICLE = ("several", "many", "various")  # what replaces them brings its own
_VERBS = ("is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "could", "would", "should")
_NEGATIONS = {f"{verb} not": f"{verb}n't" for verb in _VERBS}
_NEGATIONS |= {"cannot": "can't", "will not": "won't"}

_AUXILIARY = r"(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)"
_ONE = r"(?!.*\b(?:and|or|,) (?:what|where|when|who|how|why|which)\b)"  # a single question
_FRAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(?:Can|Could) you (?:please )?(?:tell me|name|state) (what|who) (.+) (is|was|are|were)\?", (r"\1 \3 \2?",)),
    (rf"What (is|was|are|were) {_ONE}((?:the|his|her|its|their) .+)\?",
     (r"Can you tell me what \2 \1?", r"Do you know what \2 \1?")),
    (rf"Who (is|was|are|were) {_ONE}(.+)\?", (r"Can you tell me who \2 \1?", r"Do you know who \2 \1?")),
    (rf"Who (?!{_AUXILIARY}\b){_ONE}(.+)\?", (r"Can you tell me who \1?", r"Do you know who \1?")),
    (rf"How (?={_AUXILIARY}\b)(.+)", (r"In what way \1",)),
    (rf"Where (?={_AUXILIARY}\b)(.+)", (r"In what place \1",)),
    (rf"When (?={_AUXILIARY}\b)(.+)", (r"At what time \1",)),
    (rf"Why (?={_AUXILIARY}\b)(.+)", (r"For what reason \1",)),
    (r"Could you (.+)", (r"Can you \1", r"Are you able to \1")),
    (r"Can you (.+)", (r"Could you \1", r"Are you able to \1")),
    (r"(What|Who|Which|Did|Does|Do|Is|Are|Was|Were|Has|Have|In what|In which|At what|By what|How|On what) (.+\?)",
     (r"Here is a question: \1 \2", r"Please answer this: \1 \2")),
)  # fmt: skip
# A clause is moved only if it holds no capital (it may be a title), and a head is lowered only if it is no name.
_LEADING = re.compile(r"((?:In|During|After|Before|Throughout) [a-z0-9][^A-Z,.]{2,60}), (.+?)([.!])")
_ALTHOUGH = re.compile(r"((?:Although|While|Because|Since|When|As) [a-z][^,.]{5,120}), (.+?)([.!])")
_BECAUSE = re.compile(
    r"(The|This|These|He|She|They|It|His|Her|Their|Its|There) ([^,.]+) (because|although) ([^,.]+)([.!])"
)
_NAME = r"[A-Z][\w'’-]+(?: (?:[A-Z][\w'’-]+|de|van|von|bin|al)){0,4}"
_IS = re.compile(rf"((?:The|His|Her|Their) .+) (is|was) ({_NAME})\.")
_SPAN = re.compile(r"\"[^\"]+\"|“[^”]+”|‘[^’]+’|«[^»]+»|(?<!\w)'[^']+'(?!\w)|\*[^*]+\*|(?<!\w)_[^_]+_(?!\w)|`[^`]+`")
_SENTENCE = re.compile(r"(?<=[.!?])(\s+)")


def paraphrase(text: str, seed: int) -> str:
    """Say the same in other words, where any rule applies; otherwise the text as it is (ours).

    Args:
        text: English question or answer of one or more sentences.
        seed: Which of the possible rewordings; the same text and seed give the same result everywhere.

    Returns:
        A rewording with the same names, numbers and quoted titles, different from ``text`` if any rule applies.

    Example:
        >>> paraphrase("What is the full name of the author of 'Why not'?", seed=0)
        "Do you know what the complete name of the writer of 'Why not' is?"
        >>> paraphrase("Paris", seed=0)
        'Paris'
    """
    draw = random.Random(f"{seed}:{text}")
    spans = _SPAN.findall(text)
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
    parts = _SENTENCE.split(_SPAN.sub(mark, text))
    out = "".join(part if part.isspace() else _sentence(part, draw) for part in parts)
    held = iter(spans)
    return re.sub(mark, lambda _: next(held), out)


def _sentence(text: str, draw: random.Random) -> str:
    out = _reorder(_reframe(text, draw))
    swapped = _swap(out, lambda: draw.random() < 0.7, draw)
    return swapped if swapped != text else _swap(out, lambda: True, draw)


def _reframe(text: str, draw: random.Random) -> str:
    for pattern, frames in _FRAMES:
        match = re.fullmatch(pattern, text)
        if match:
            return _upper(match.expand(draw.choice(frames)))
    return text


def _reorder(text: str) -> str:
    if match := _LEADING.fullmatch(text):
        clause, rest, end = match.groups()
        return f"{_upper(rest)} {_lower(clause)}{end}"
    if match := _ALTHOUGH.fullmatch(text):
        clause, rest, end = match.groups()
        return f"{_upper(rest)}, {_lower(clause)}{end}"
    if match := _IS.fullmatch(text):
        head, verb, name = match.groups()
        return f"{name} {verb} {_lower(head)}."
    if match := _BECAUSE.fullmatch(text):
        head, rest, link, clause, end = match.groups()
        return f"{_upper(link)} {clause}, {_lower(head)} {rest}{end}"
    return text


def _swap(text: str, take: Callable[[], bool], draw: random.Random) -> str:
    """Swap phrases in one pass, so that nothing is swapped back; an article before a phrase follows its new sound."""

    def other(match: re.Match[str]) -> str:
        article, phrase = match.group(1), match.group(2)
        if not take() or (article and phrase in _NO_ARTICLE):
            return match.group()
        new = draw.choice(_TABLE[phrase])
        return f"{'an' if new[0] in 'aeiou' else 'a'} {new}" if article else new

    return _PHRASES.sub(other, text)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


_TABLE = (
    _SWAPS | {full: (short,) for full, short in _NEGATIONS.items()} | {s: (full,) for full, s in _NEGATIONS.items()}
)
_LONGEST = sorted(map(re.escape, _TABLE), key=len, reverse=True)
_PHRASES = re.compile(rf"(?<![\w'’-])(?:(an?) )?({'|'.join(_LONGEST)})(?!\w|-|['’](?!s\b))")
