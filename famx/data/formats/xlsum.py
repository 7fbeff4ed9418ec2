"""XL-Sum (Hasan et al., 2021), version 2: BBC articles and their summaries in 45 languages.

Official files: `<language>_{train,val,test}.jsonl`, each line with `id`, `url`, `title`, `summary`
and `text`, in a tar.bz2 archive per language or for all; or Parquet or Arrow files with these columns in
a folder `<language>`. Every language is a task `xlsum_<language>`; `xlsum` is the mixture of all
languages in proportion to their numbers of examples.

ROUGE uses the tokens of `famx.data.metrics.unicode_tokens`, because the English tokenizer finds no tokens
in most of these scripts. The scores are comparable with each other but not with published ones;
`famx.data.metrics.text_tokens` explains why.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from famx.base.errors import ConfigError
from famx.base.ranges import Name, Positive, Rate, Seed
from famx.base.values import checked
from famx.data.metrics import rouge, unicode_tokens
from famx.data.storage import JsonlRecords, open_split
from famx.data.tasks.examples import Example, Records
from famx.data.tasks.mixtures import Mixture
from famx.data.tasks.text_task import TextTask, task_factories
from famx.data.vocabularies import AnyVocabulary

PUBLISHED = "https://github.com/csebuetnlp/xl-sum"
_COLUMNS = ("id", "url", "title", "summary", "text")

LANGUAGES: dict[str, tuple[int, int, int]] = {  # number of examples for train, validation, test
    "amharic": (5761, 719, 719),
    "arabic": (37519, 4689, 4689),
    "azerbaijani": (6478, 809, 809),
    "bengali": (8102, 1012, 1012),
    "burmese": (4569, 570, 570),
    "chinese_simplified": (37362, 4670, 4670),
    "chinese_traditional": (37373, 4670, 4670),
    "english": (306522, 11535, 11535),
    "french": (8697, 1086, 1086),
    "gujarati": (9119, 1139, 1139),
    "hausa": (6418, 802, 802),
    "hindi": (70778, 8847, 8847),
    "igbo": (4183, 522, 522),
    "indonesian": (38242, 4780, 4780),
    "japanese": (7113, 889, 889),
    "kirundi": (5746, 718, 718),
    "korean": (4407, 550, 550),
    "kyrgyz": (2266, 500, 500),
    "marathi": (10903, 1362, 1362),
    "nepali": (5808, 725, 725),
    "oromo": (6063, 757, 757),
    "pashto": (14353, 1794, 1794),
    "persian": (47251, 5906, 5906),
    "pidgin": (9208, 1151, 1151),
    "portuguese": (57402, 7175, 7175),
    "punjabi": (8215, 1026, 1026),
    "russian": (62243, 7780, 7780),
    "scottish_gaelic": (1313, 500, 500),
    "serbian_cyrillic": (7275, 909, 909),
    "serbian_latin": (7276, 909, 909),
    "sinhala": (3249, 500, 500),
    "somali": (5962, 745, 745),
    "spanish": (38110, 4763, 4763),
    "swahili": (7898, 987, 987),
    "tamil": (16222, 2027, 2027),
    "telugu": (10421, 1302, 1302),
    "thai": (6616, 826, 826),
    "tigrinya": (5451, 681, 681),
    "turkish": (27176, 3397, 3397),
    "ukrainian": (43201, 5399, 5399),
    "urdu": (67665, 8458, 8458),
    "uzbek": (4728, 590, 590),
    "vietnamese": (32111, 4013, 4013),
    "welsh": (9732, 1216, 1216),
    "yoruba": (6350, 793, 793),
}


def unicode_rouge(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """`famx.data.metrics.rouge` with `unicode_tokens`."""
    return rouge(targets, predictions, tokenize=unicode_tokens)


def preprocess(record: Mapping[str, Any]) -> Example:
    """Make an example of a record: the text and a blank line, and the summary, without the title."""
    summary = record["summary"]
    return {
        "id": record["id"],
        "inputs": f"{record['text']}\n\n",
        "targets": summary,
        "references": [summary] if summary else [],
    }


def _open_split(language: str) -> Callable[[str, str], Records]:
    def open_language(folder: str, split: str) -> Records:
        names = ("val", "dev", "validation") if split == "validation" else (split,)
        paths = [os.path.join(folder, f"{language}_{name}.jsonl") for name in names]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is not None:
            return JsonlRecords(path, _COLUMNS)
        try:
            return open_split(os.path.join(folder, language), split, _COLUMNS)
        except FileNotFoundError as error:
            raise FileNotFoundError(None, "missing", paths[0]) from error

    return open_language


@checked
def xlsum(
    languages: Sequence[Name] | None = None,
    rates: Mapping[Name, Rate] | Callable[[int], float] | None = None,
    size: Positive | None = None,
    seed: Seed = 0,
    split: Name = "train",
    vocabulary: AnyVocabulary = "bytes",
    **options: Any,
) -> Mixture:
    """Make the mixture of languages.

    Args:
      languages: names in `LANGUAGES`; None: all.
      rates, size, seed, split: as for `Mixture`; rates may name languages without `xlsum_`.
      vocabulary: see `famx.data.vocabularies.as_vocabulary`.
      **options: other settings of every task, such as `data_dir` and `max_tokens`.

    Raises:
      ConfigError: a language is unknown, or as `Mixture` and `TextTask`.
    """
    names = list(LANGUAGES if languages is None else languages)
    for name in names:
        if name not in LANGUAGES:
            near = difflib.get_close_matches(name, LANGUAGES, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"'{name}' is no language of XL-Sum; the nearest name is '{near}', all are "
                f"{', '.join(LANGUAGES)}."
            )
    if isinstance(rates, Mapping):
        rates = {f"xlsum_{name.removeprefix('xlsum_')}": rate for name, rate in rates.items()}
    tasks = tuple(_LANGUAGE_TASKS[f"xlsum_{x}"](vocabulary=vocabulary, **options) for x in names)
    return Mixture("xlsum", tasks, rates, size, seed, split)


_LANGUAGE_TASKS = task_factories(
    TextTask(
        name=f"xlsum_{language}",
        kind="generation",
        open_split=_open_split(language),
        preprocess=preprocess,
        metrics=(unicode_rouge,),
        folders=("xlsum", "XLSum_complete_v2.0", f"{language}_XLSum_v2.0", ""),
        published=PUBLISHED,
        counts=dict(zip(("train", "validation", "test"), counts)),
    )
    for language, counts in LANGUAGES.items()
)
TASKS = {**_LANGUAGE_TASKS, "xlsum": xlsum}
