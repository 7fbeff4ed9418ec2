"""Tokenizers for ROUGE: English, and any script.

`english_tokens` is the tokenizer of the `rouge_score` package. It knows a-z and 0-9 only, so a text in
Arabic or Chinese has no tokens and scores 0. `unicode_tokens` handles any script without being told the
language. The published scores of XL-Sum come from its authors' fork of `rouge_score`, which is told the
language. Scores of the two are similar in meaning but not comparable. The differences:

| | XL-Sum's fork | `unicode_tokens` |
|---|---|---|
| stemming, if requested | 18 languages, words of more than 3 characters | none |
| Chinese, Japanese, Thai, Burmese | words of a segmenter per language | one token per character |
| Han characters without a language | one token per character | the same |
| Lao, Khmer, kana without a language | words between spaces | one token per character |
| words between spaces | split further by `pyonmttok` in aggressive mode | whole, also `covid19` |
| symbols such as € and ° | kept unless ASCII | dropped |
| variants of a character (full width, ligatures) | different | the same (NFKC) |

A character is a letter with its marks: a Thai or Burmese letter keeps its vowel signs. One token per
character gives higher scores than one per word, so compare these scores with each other and not with
published ones.
"""

import functools
import re
import unicodedata

# First words of the Unicode names of the letters of all scripts that are written without spaces.
_SPACELESS = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def english_tokens(text: str) -> list[str]:
    """Runs of a-z and 0-9 in the lower-cased text, without stemming, as in SCROLLS and T5."""
    return re.findall("[a-z0-9]+", text.lower())


def unicode_tokens(text: str) -> list[str]:
    """Words of any script: runs of letters, marks and digits, normalised (NFKC) and lower-cased.

    A letter of Han, Hiragana, Katakana, Thai, Lao, Khmer or Burmese, with the marks that follow it, is
    one token. Joiners and other invisible format characters are dropped without splitting a word;
    everything else separates tokens.
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
