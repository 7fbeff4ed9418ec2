"""Packed rows: each row of the batch is an endless stream of documents."""

from famx.data.rows.documents import Documents
from famx.data.rows.lanes import ContinuousLanes


class PackedRows(ContinuousLanes):
    """An endless iterator of batches whose rows contain several documents.

    Like `ContinuousLanes`, but when a document ends, the lane continues with the next one in the same
    row. Nothing masks one document from the next: the model must learn to forget. A document that is
    longer than the rest of its row continues at the start of the same lane's row in the next step, so
    a state can be carried. Every step yields, for the rows of this shard (B = batch_size / num_shards):

      decoder_input_tokens int32 [B, L]: the targets shifted by one, with bos first in a document
      decoder_target_tokens int32 [B, L]: the tokens of the documents, without separators
      decoder_loss_weights float32 [B, L]: 1, or the weights of the documents, unchanged
      reset bool [B]: True if the row begins with a new document

    With `whole_documents`, a document that fits into a row but not into the rest of this one is put
    into the lane's next row, and the rest of this row is padding with weight 0. A document longer than
    a row begins immediately. Without `whole_documents`, rows have no padding.

    The order of an epoch, the division among shards, and `get_state`/`set_state` are those of
    `ContinuousLanes`: every epoch has every document once, all hosts follow one global schedule, and a
    state resumes in the middle of a document on any number of shards.
    """

    _several_documents = True

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        length: int,
        seed: int = 0,
        shard_index: int = 0,
        num_shards: int = 1,
        bos_id: int = 1,
        pad_id: int = 0,
        whole_documents: bool = False,
        skip_bad: bool = False,
    ):
        """
        Args:
          documents: see `famx.data.rows.Documents`; none may be empty.
          batch_size: number of rows of all shards together.
          length: number of tokens of a row; may be changed between steps.
          seed: seed of the order of the documents.
          shard_index, num_shards: this host yields rows `shard_index * B` to
            `(shard_index + 1) * B - 1` of the global batch.
          bos_id, pad_id: id before a document, and id in the rest of a row that no document fits into.
          whole_documents: never cut a document that fits into a row.
          skip_bad: see `ContinuousLanes`.

        Raises:
          ValueError: there is no document, a size is out of range, or the batch does not divide among
            the shards.
        """
        super().__init__(
            documents, batch_size, length, seed, shard_index, num_shards, bos_id, pad_id,
            skip_bad)
        self._whole_documents = whole_documents
