"""Records of JSON lines and TFRecords: any record by its number, the same bytes as TensorFlow's."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famx.data import ByteVocabulary, ContinuousLanes, WordVocabulary
from famx.data.storage import tfrecord
from famx.data.storage.records import JsonlRecords, RecordDocuments, TFRecordRecords, write_tfrecords

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(), JSON_VALUES, max_size=4)
RECORDS = st.dictionaries(
    st.text(max_size=5),
    st.binary(max_size=300)
    | st.lists(st.binary(max_size=5), min_size=2, max_size=4)
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40).map(lambda x: np.array(x, np.int64))
    | st.lists(st.floats(width=32), max_size=40).map(lambda x: np.array(x, np.float32)),
    max_size=4,
)  # fmt: skip


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], np.ndarray):
            assert a[name].dtype == b[name].dtype
            assert a[name].tobytes() == b[name].tobytes()
        else:
            assert a[name] == b[name]


def test_neither_records_nor_packing_need_tensorflow():
    code = "import sys\nfor x in ('tensorflow', 'seqio', 'google.protobuf'): sys.modules[x] = None\n"
    code += "import famx.data.storage.records, famx.data.rows.packing"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------- JSON lines
@settings(max_examples=40, deadline=None)
@given(
    files=st.lists(st.lists(OBJECTS, max_size=6), min_size=1, max_size=3),
    ascii_only=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    last=st.booleans(),
)
def test_any_line_is_the_object_that_was_written(
    tmp_path_factory, files, ascii_only, newline, last
):
    folder = tmp_path_factory.mktemp("jsonl")
    for i, objects in enumerate(files):
        lines = [json.dumps(x, ensure_ascii=ascii_only) for x in objects]
        text = newline.join(lines) + (newline if last else "")
        (folder / f"{i}.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    expected = [x for objects in files for x in objects]
    if not expected:
        with pytest.raises(ValueError, match="There is no record"):
            JsonlRecords(str(folder / "*.jsonl"))
        return
    records = JsonlRecords(str(folder / "*.jsonl"))
    assert len(records) == len(expected)
    for i in reversed(range(len(expected))):
        assert records[i] == expected[i]


def test_columns_can_be_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "id": 1}\n\n{"id": 2}\n[3]\n{"text": \n')
    records = JsonlRecords(path, fields=["text"])
    assert records[0] == {"text": "x"} and JsonlRecords(path)[1] == {"id": 2}
    with pytest.raises(ValueError, match=r"Line 3 of .*a.jsonl has no column 'text'; .* are id\."):
        records[1]
    with pytest.raises(ValueError, match=r"Line 4 of .*a.jsonl is not a JSON object"):
        records[2]
    with pytest.raises(ValueError, match=r"Line 5 of .*a.jsonl is broken JSON"):
        records[3]
    with pytest.raises(ValueError, match=r"Line 1 of .* no column 'body'; its columns are text, id"):
        JsonlRecords(path, fields=["body"])
    with pytest.raises(IndexError, match="Record 4 is not one of 4"):
        records[4]


def test_text_that_is_not_utf8_is_named_and_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\n{"a": "\xe9"}\n')
    records = JsonlRecords(path)
    assert records[0] == {"a": "é"}
    with pytest.raises(ValueError, match="Line 2 of .* is broken JSON: .*codec"):
        records[1]


def test_files_that_are_missing_empty_or_shortened(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(ValueError, match="No file matches '.*a'"):
        JsonlRecords(path)
    path.write_text("\n \r\n")
    for kind in (JsonlRecords, TFRecordRecords):
        with pytest.raises(ValueError, match="There is no record in .*; name files with data"):
            path.write_bytes(b"" if kind is TFRecordRecords else b"\n \r\n")
            kind(path)
    path.write_text('{"a": 1}\n{"a": 2}\n')
    records = JsonlRecords(path)
    os.truncate(path, 9)
    with pytest.raises(ValueError, match="has become shorter"):
        records[1]


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("famx.data.storage.records._OPEN_FILES", 2)
    for i in range(5):
        (tmp_path / str(i)).write_text(f'{{"i": {i}}}\n')
    records = JsonlRecords([tmp_path / "*"])
    for i in (0, 4, 2, 0, 1, 3, 4):
        assert records[i] == {"i": i} and len(records._files) <= 2


def test_a_file_stays_open_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_text('{"a": 1}\n')
    records = JsonlRecords(tmp_path / "a")
    read = os.pread

    def pread(*arguments):
        records._files.clear()  # as another thread does that opens too many files
        return read(*arguments)

    monkeypatch.setattr("famx.data.storage.records.os.pread", pread)
    assert records[0] == {"a": 1}


# -------------------------------------------------------------------- TFRecords
def slow_masked_crc(data):
    """CRC-32C bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 100))
def test_checksums_equal_the_bitwise_ones(size, seed):
    data = np.random.default_rng(seed).bytes(size)
    assert tfrecord.masked_crc(data) == slow_masked_crc(data)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 1023, 1024, 1025, 2048])
def test_checksums_at_the_edges_of_blocks(size):
    data = bytes(range(256)) * 8
    assert tfrecord.masked_crc(data[:size]) == slow_masked_crc(data[:size])


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=7), st.integers(1, 4), st.booleans())
def test_records_are_read_as_they_were_written(tmp_path_factory, records, num_shards, check_crc):
    name = tmp_path_factory.mktemp("records") / "train"
    paths = write_tfrecords(name, records, num_shards)
    assert paths == [f"{name}-{i:05d}-of-{num_shards:05d}" for i in range(num_shards)]
    assert sorted(str(x) for x in name.parent.iterdir()) == paths
    read = TFRecordRecords(f"{name}-*", check_crc)
    assert len(read) == len(records)
    expected = [x for i in range(num_shards) for x in records[i::num_shards]]
    for i in reversed(range(len(records))):
        assert_same(read[i], expected[i])


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@settings(max_examples=40, deadline=None)
@given(record=RECORDS)
def test_examples_are_tensorflow_s(tf, record):
    example = tf.train.Example.FromString(tfrecord.encode_example(record))
    assert set(example.features.feature) == set(record)
    for name, value in record.items():
        feature = example.features.feature[name]
        kind = feature.WhichOneof("kind")
        if isinstance(value, np.ndarray):
            assert kind == {"i": "int64_list", "f": "float_list"}[value.dtype.kind]
            read = np.array(getattr(feature, kind).value, value.dtype)
            np.testing.assert_array_equal(read, value)
        else:
            assert list(feature.bytes_list.value) == ([value] if isinstance(value, bytes) else value)
    assert_same(tfrecord.decode_example(example.SerializeToString()), record)


def test_files_are_tensorflow_s(tf, tmp_path):
    records = [dict(tokens=np.arange(3000) * 10**i, text=b"x" * i) for i in range(5)]
    (ours,) = write_tfrecords(tmp_path / "ours", records)
    theirs = str(tmp_path / "theirs")
    with tf.io.TFRecordWriter(theirs) as writer:
        for data in tf.data.TFRecordDataset(ours).as_numpy_iterator():
            writer.write(data)
    with open(ours, "rb") as a, open(theirs, "rb") as b:
        assert a.read() == b.read()
    read = TFRecordRecords(theirs, check_crc=True)
    for i, record in enumerate(records):
        assert_same(read[i], record)


def test_lists_that_are_not_packed_and_features_without_a_list():
    def field(number, wire, data):
        return bytes([number << 3 | wire]) + data

    def delimited(number, data):
        return field(number, 2, bytes([len(data)]) + data)

    def example(feature):
        return delimited(1, delimited(1, delimited(1, b"x") + delimited(2, feature)))

    ints = delimited(3, field(1, 0, b"\x05") + field(1, 0, b"\xff" * 9 + b"\x01"))
    assert tfrecord.decode_example(example(ints))["x"].tolist() == [5, -1]
    with pytest.raises(ValueError, match="not a tf.train.Example: a number is longer than 10 bytes"):
        tfrecord.decode_example(example(delimited(3, delimited(1, b"\xff" * 10 + b"\x01"))))
    with pytest.raises(ValueError, match="not a tf.train.Example: a number is cut off"):
        tfrecord.decode_example(example(delimited(3, delimited(1, b"\xff"))))
    floats = delimited(2, field(1, 5, np.float32(0.1).tobytes()) + field(1, 5, bytes(4)))
    assert tfrecord.decode_example(example(floats))["x"].tolist() == [float(np.float32(0.1)), 0]
    assert tfrecord.decode_example(example(b"")) == {"x": []}
    unknown = field(7, 0, b"\x80\x01") + field(6, 5, bytes(4)) + field(5, 1, bytes(8))
    assert tfrecord.decode_example(unknown + example(ints))["x"].tolist() == [5, -1]


def test_values_of_python_are_written():
    record = dict(text="é", texts=["a", b"b"], flag=True, count=3, part=0.5, ids=[1, -2], none=[])
    read = tfrecord.decode_example(tfrecord.encode_example(record))
    expected = dict(
        text="é".encode(), texts=[b"a", b"b"], flag=np.array([1]), count=np.array([3]),
        part=np.float32([0.5]), ids=np.array([1, -2]), none=np.zeros(0, np.float32),
    )  # fmt: skip
    assert_same(read, expected)
    for value in (None, np.zeros((2, 2)), ["a", 1], [[1], [2, 3]], {}, np.uint64(2**63), 1j):
        with pytest.raises(ValueError, match="'bad' cannot be written"):
            tfrecord.encode_example({"bad": value})


def test_a_failed_write_leaves_nothing(tmp_path):
    (old,) = write_tfrecords(tmp_path / "a", [{"x": 1}])
    with pytest.raises(ValueError, match="cannot be written"):
        write_tfrecords(tmp_path / "a", [{"x": 2}, {"x": None}])
    assert os.listdir(tmp_path) == [os.path.basename(old)]
    assert TFRecordRecords(old)[0]["x"].tolist() == [1]
    with pytest.raises(ValueError, match="The folder .*no.* does not exist"):
        write_tfrecords(tmp_path / "no" / "a", [])
    with pytest.raises(ValueError, match="at least 1 shard"):
        write_tfrecords(tmp_path / "a", [], 0)


def test_damaged_files_get_a_sentence(tmp_path):
    (path,) = write_tfrecords(tmp_path / "a", [{"x": np.arange(200)}, {"x": 5}])
    with open(path, "rb") as file:
        whole = file.read()

    def damaged(data):
        with open(path, "wb") as file:
            file.write(data)
        return path

    with pytest.raises(ValueError, match="is cut off in the record at byte"):
        TFRecordRecords(damaged(whole[:-1]))
    with pytest.raises(ValueError, match="is cut off in the record at byte"):
        TFRecordRecords(damaged(whole + b"12345"))
    with pytest.raises(ValueError, match="is not a TFRecord file"):
        TFRecordRecords(damaged(b'{"text": "this is a line of JSON"}\n'))
    flipped = bytearray(whole)
    flipped[100] ^= 1
    damaged(flipped)
    assert len(TFRecordRecords(path)[0]["x"]) == 200
    with pytest.raises(ValueError, match="checksum of the record at byte 0 is wrong"):
        TFRecordRecords(path, check_crc=True)[0]
    second = int(TFRecordRecords(damaged(whole))._spans[1, 0])
    flipped = bytearray(whole)
    flipped[second + 9] ^= 1  # the checksum of the second length
    TFRecordRecords(damaged(flipped))
    with pytest.raises(ValueError, match=f"damaged at byte {second}"):
        TFRecordRecords(path, check_crc=True)
    for data in (b"\x0a\x05ab", b"\x0f", b"\xff" * 11):
        with pytest.raises(ValueError, match="byte 0: The record is not a tf.train.Example"):
            TFRecordRecords(damaged(tfrecord.frame(data)))[0]


# ------------------------------------------------------------------- documents
def test_text_and_ids_become_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hé", "w": [1, 0.1, 2]}\n', "utf-8")
    documents = RecordDocuments(JsonlRecords(path), "text", "w", ByteVocabulary())
    tokens, weights = documents[0]
    assert tokens.tolist() == ByteVocabulary().encode("hé") and tokens.dtype == np.int32
    assert weights.tobytes() == np.float32([1, 0.1, 2]).tobytes() and len(documents) == 1
    step = next(ContinuousLanes(documents, 1, 4))
    assert step["decoder_loss_weights"][0].tobytes() == np.float32([1, 0.1, 2, 0]).tobytes()

    (path,) = write_tfrecords(tmp_path / "b", [{"ids": [4, 5], "text": "a b"}])
    records = TFRecordRecords(path)
    assert RecordDocuments(records, "ids")[0].tolist() == [4, 5]
    words = RecordDocuments(records, "text", vocabulary=WordVocabulary(["b", "a"]))[0]
    assert words.tolist() == [5, 4] and words.dtype == np.int32


def test_bad_documents_get_a_sentence():
    def read(record, weights=None):
        return RecordDocuments([record], "x", weights)[0]

    with pytest.raises(ValueError, match="Record 0 has no column 'x'; its columns are y, z"):
        read({"y": 1, "z": 2})
    with pytest.raises(ValueError, match="no column 'w'; its columns are x"):
        read({"x": [1]}, "w")
    with pytest.raises(ValueError, match="is text; give the vocabulary"):
        read({"x": "text"})
    for bad in ([0.5], [-1], [2**31], [[1]], 3, None, [None]):
        with pytest.raises(ValueError, match="is not a list of token ids"):
            read({"x": bad})
    assert read({"x": []}).tolist() == []
