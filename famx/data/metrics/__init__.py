"""Metrics of answers: digits, texts, ranked choices, and sums of next-token losses.

| task | as reported in | metric here |
|---|---|---|
| PassKey | TransformerFAM | `exact_match` on ids; `passkey_accuracy` on generated text |
| PG-19, Isabelle | TransformerFAM | `next_token_accuracy` |
| NarrativeQA, Qasper | TransformerFAM | `rouge`, key `rougeL` |
| NarrativeQA, Qasper | SCROLLS | `token_f1` |
| QuALITY | TransformerFAM | `rank_accuracy` |
| QuALITY, ContractNLI | SCROLLS | `text_exact_match` |
| GovReport, SummScreenFD, QMSum | SCROLLS | `rouge`, key `geometric_mean` |
| XLSum | TransformerFAM | `rouge` with `tokenize=unicode_tokens`, key `rougeL` |
| GPT-3 rank tasks (ARC, HellaSwag, ...) | GPT-3, T5 | `rank_accuracy`, some with `lengths` |
| SQuAD; Natural Questions, WebQuestions | T5 | `squad` |
| TriviaQA | T5 | `trivia_qa` |
| LAMBADA and other fixed answers | GPT-3 | `accuracy` |
| RULER: needles, variables, words | RULER | `string_match_all` |
| RULER: questions | RULER | `string_match_part` |
| any text | language modelling | `bits_per_byte`, `perplexity` |

The TransformerFAM paper names its metrics but not their tokenizers or normalisation; those are ours.

Metrics of texts take `(targets, predictions)`, as SeqIO's do, and return `{name: 0..100}`, not rounded.
`predictions` has one string per example; a target is a string or a collection of strings, the
references, of which the best counts unless stated otherwise. The empty string is a valid text.
ValueError is raised if the counts differ, if there is no example, if an example has no reference, or if a
value is not a string.
"""

from famx.data.metrics.answers import (
    accuracy,
    babilong_accuracy,
    normalize_squad,
    normalize_trivia_qa,
    passkey_accuracy,
    passkey_first_integer,
    rouge,
    squad,
    string_match_all,
    string_match_part,
    text_exact_match,
    token_f1,
    trivia_qa,
)
from famx.data.metrics.averaging import Texts
from famx.data.metrics.choices import rank_accuracy
from famx.data.metrics.digits import digit_accuracy, exact_match
from famx.data.metrics.losses import bits_per_byte, next_token_accuracy, perplexity
from famx.data.metrics.rouge_scores import lcs_length, rouge_l, rouge_n
from famx.data.metrics.text_tokens import english_tokens, unicode_tokens

__all__ = [
    "Texts",
    "accuracy",
    "babilong_accuracy",
    "bits_per_byte",
    "digit_accuracy",
    "english_tokens",
    "exact_match",
    "lcs_length",
    "next_token_accuracy",
    "normalize_squad",
    "normalize_trivia_qa",
    "passkey_accuracy",
    "passkey_first_integer",
    "perplexity",
    "rank_accuracy",
    "rouge",
    "rouge_l",
    "rouge_n",
    "squad",
    "string_match_all",
    "string_match_part",
    "text_exact_match",
    "token_f1",
    "trivia_qa",
    "unicode_tokens",
]
