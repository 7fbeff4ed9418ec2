"""A look at the documents of a task before a run begins, as far as it takes little time."""

import time
from typing import Any

from famx.base.errors import BadRecord
from famx.data.rows.documents import CheckedDocuments

_SECONDS = 2.0  # time after which the other documents are left to the run


def check_documents(documents: Any, skip_bad: bool = False) -> list[str]:
    """Checks documents, from the first on, for a few seconds at most; makes no tokens.

    Returns:
      For `skip_bad`, the sentences of bad ones that were found.

    Raises:
      BadRecord: a document cannot be used, and `skip_bad` is False.
      BadData: none of them can be used.
    """
    found: list[str] = []
    if not isinstance(documents, CheckedDocuments):
        return found
    end = time.monotonic() + _SECONDS
    for i in range(len(documents)):
        try:
            documents.check(i)
        except BadRecord as error:
            if not skip_bad:
                raise
            found.append(str(error))
        if time.monotonic() > end:
            break
    return found
