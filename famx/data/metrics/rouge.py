"""ROUGE-N and ROUGE-L on sequences of tokens, and two tokenizers: English, and any script.

ROUGE (Lin, 2004) counts what a prediction shares with a reference: runs of `n` tokens (ROUGE-N), or
the longest common subsequence (ROUGE-L). Every score here is the F-measure, 0..1.

`english_tokens` is the tokenizer of the `rouge_score` package. It knows a-z and 0-9 alone, so a text
in Arabic or Chinese has no tokens and scores 0. `unicode_tokens` reads any script and needs no
language. The scores reported for XLSum come from a fork of `rouge_score` by its authors, which is told
the language. Numbers of the two are close in spirit but cannot be compared; what differs is:

| | XLSum's fork | `unicode_tokens` |
|---|---|---|
| stems, where asked for | 18 languages, words of more than 3 characters | none |
| Chinese, Japanese, Thai, Burmese | words of a segmenter for each | one character, one token |
| Han without a language | one character, one token | the same |
| Lao, Khmer, kana without a language | words between spaces | one character, one token |
| words between spaces | cut further by `pyonmttok`, aggressive mode | whole, `covid19` too |
| symbols such as € and ° | kept unless ASCII | dropped |
| variants of a character (full width, ligatures) | kept apart | one form (NFKC) |

A character is a letter with the marks that belong to it: a Thai or Burmese letter keeps its vowel
signs. One token per character gives higher scores than one per word, so compare these scores with
each other and not with published ones.
"""

import collections
import functools
import re
import unicodedata
from collections.abc import Hashable, Sequence

# First words of the Unicode names of the letters of all scripts that are written without spaces.
_SPACELESS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def english_tokens(text: str) -> list[str]:
    """Runs of a-z and 0-9 of the lower-cased text; not stemmed, as in SCROLLS and T5."""
    return re.findall("[a-z0-9]+", text.lower())


def unicode_tokens(text: str) -> list[str]:
    """Words of any script: runs of letters, marks and digits, normalised (NFKC) and lower-cased.

    A letter of Han, Hiragana, Katakana, Thai, Lao, Khmer or Burmese is a token of its own, together
    with the marks that follow it. Joiners and other invisible format characters are dropped without
    splitting the word; everything else separates tokens.
    """
    tokens: list[str] = []
    last = "separator"
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = _kind(character)
        if kind == "invisible":
            continue
        if kind == "mark" and last != "separator" or kind == last == "word":
            tokens[-1] += character
            continue
        if kind != "separator":
            tokens.append(character)
        last = "word" if kind == "mark" else kind
    return tokens


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return "invisible"
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return "separator"
    name = unicodedata.name(character, "")
    return "alone" if category != "Nd" and name.startswith(_SPACELESS) else "word"


def rouge_n(reference: Sequence[Hashable], prediction: Sequence[Hashable], n: int) -> float:
    """ROUGE-N, 0..1: F-measure of the runs of `n` tokens, each counted as often as both have it.

    0 if either side has no such run. With `n=1` this is the token F1 of SQuAD.
    """
    if n < 1:
        raise ValueError(f"ROUGE-N needs runs of at least 1 token, but n is {n}.")
    ours, theirs = (
        collections.Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (reference, prediction)
    )
    return _f_measure((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(reference: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """ROUGE-L, 0..1: F-measure of the longest common subsequence; 0 if either side is empty."""
    return _f_measure(lcs_length(reference, prediction), len(reference), len(prediction))


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, in about `len(first) * len(second) / 64` steps."""
    places: dict[Hashable, int] = collections.defaultdict(int)
    for i, token in enumerate(first):
        places[token] |= 1 << i
    # One row of the table of lengths as bits: bit i is 0 where the row grows by one at token i of
    # `first`. The carry of an addition finds, in each stretch of ones, the place that grows next.
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for token in second:
        if token in places:
            common = row & places[token]
            row = (row + common | row - common) & everywhere
    return len(first) - row.bit_count()


def _f_measure(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0
