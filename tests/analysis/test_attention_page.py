"""The attention page holds the numbers of the maps, and shows them in a browser."""

import base64
import dataclasses
import functools
import html.parser
import json
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
from matplotlib import image as images
from modules.helpers import config, random_params, random_tokens

from famx.analysis import AttentionReader, attention_page, tracing
from famx.analysis.attention_page import _rows
from famx.base.errors import ConfigError
from famx.base.palette import MEMORY, OWN, PAST
from famx.memories import Fam
from famx.modules import Decoder, Memory

S, N, M = 8, 3, 2
TEXTS = ["a", "$x^2", "<b>", "</script>", "@DATA@", "a\\b", "&amp;", "c", "␣", '"', "梦", "$5", "x" * 40]
BLOCKS = (0, 2, 3, 4)  # those whose maps are kept, of 5
DATA_JS = attention_page.__file__.replace("attention_page.py", "page/data.js")


@functools.cache
def make_maps(**changes):
    sizes = dict(block_size=S, memory=Fam(N), memory_segments=M, num_heads=4, head_dim=4)
    c = config(**{**sizes, **changes})
    tokens = random_tokens(1, 4 * S + 3)[0]
    read = AttentionReader(Decoder(c)).read
    return read(random_params(c), [tokens], label=lambda i: TEXTS[i], blocks=BLOCKS)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of the script with the id `data`."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = ("id", "data") in attributes

    def handle_data(self, data):
        self.text += data if self._inside else ""

    def handle_endtag(self, tag):
        self._inside = False


def unpacked(text, size):
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(size, -1)
    return np.ascontiguousarray(planes.T).view(f"<u{size}").ravel()


def rows_of(packed):
    """The rows of weights that `_rows` packed."""
    size = 1 if packed["scale"] == 255 else 2
    codes = unpacked(packed["codes"], size).reshape(packed["rows"], -1) / packed["scale"]
    weights = codes**2 if size == 1 else codes
    keys = np.arange(packed["columns"])[None].repeat(packed["rows"], axis=0)
    if "steps" in packed:
        keys = np.cumsum(unpacked(packed["steps"], 4).reshape(packed["rows"], -1), axis=-1)
    out = np.zeros((packed["rows"], packed["columns"]))
    np.put_along_axis(out, keys, weights, axis=-1)
    return out


def test_the_page_holds_every_map_and_needs_no_network():
    maps = make_maps()
    page = Page(attention_page.attention_page(maps, title="<i>& maps</i>"))
    assert not [tag for tag, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert [tag for tag, _ in page.tags].count("script") == 3
    data = json.loads(page.text)
    assert data["layers"] == [0, 1] and data["heads"] == [0, 1, 2, 3, "mean"]
    assert data["kept"] == list(BLOCKS) and data["blocks"] == [0, 1, 2, 3, 4]
    assert set(data["maps"]) == {f"{b}/{l}/{h}" for b in BLOCKS for l in (0, 1) for h in data["heads"]}
    for i, block in enumerate(BLOCKS):
        for layer, head in [(0, 0), (1, 3), (1, "mean")]:
            found = rows_of(data["maps"][f"{block}/{layer}/{head}"])
            of_memory, of_tokens = (
                x[i, layer].mean(0) if head == "mean" else x[i, layer, head]
                for x in (maps.memory, maps.tokens)
            )
            np.testing.assert_allclose(found[N:], of_tokens, atol=4e-3)
            memory = np.delete(found[:N], np.s_[N : N + M * S], axis=1)
            np.testing.assert_allclose(memory, of_memory, atol=4e-3)
        np.testing.assert_allclose(rows_of(data["rollout"][str(block)]), maps.rollout[i], atol=1e-5)
    records, text = maps.records, lambda places: ["·" if not p else data["texts"][p - 1] for p in places]
    for name in ("ids", "predicted"):
        expected = [maps.text(token) for token in getattr(records, name).ravel()]
        assert text(unpacked(data[name], 4)) == expected
    np.testing.assert_array_equal(unpacked(data["rank"], 4), records.rank.ravel())
    for name in ("probability", "next_probability", "shares"):
        short = name.replace("next_p", "nextP")
        found = unpacked(data[short], 2) / 65535
        np.testing.assert_allclose(found, getattr(records, name).ravel(), atol=1e-5)
    for found, update in zip(data["updates"], records.updates, strict=True):
        np.testing.assert_allclose(rows_of(found), update.reshape(-1, N + S), atol=1e-5)


def test_of_many_keys_the_largest_are_kept():
    values = np.random.default_rng(0).dirichlet(np.full(50, 0.1), size=7)
    for scale, near in ((255, 4e-3), (65535, 1e-5)):
        found = rows_of(_rows(values, 5, scale))
        for row, expected in zip(found, values):
            kept = np.argsort(-expected)[:5]
            np.testing.assert_allclose(row[kept], expected[kept], atol=near)
            assert not np.delete(row, kept).any()


def test_a_large_map_is_cut_to_its_strongest_keys(monkeypatch):
    maps = make_maps()
    queries = len(BLOCKS) * 2 * 5 * (N + S)
    monkeypatch.setattr(attention_page, "_MAX_WEIGHTS", 6 * queries)
    data = json.loads(Page(attention_page.attention_page(maps)).text)
    packed = data["maps"]["3/1/2"]
    assert packed["keys"] == 6 and packed["columns"] == N + (M + 1) * S
    kept = np.sort(maps.tokens[2, 1, 2], axis=-1)[:, -6:]
    np.testing.assert_allclose(np.sort(rows_of(packed)[N:], axis=-1)[:, -6:], kept, atol=4e-3)


def test_a_long_text_is_shown_from_its_end(monkeypatch):
    maps, names = make_maps(), ("blocks", "slots", "ids", "tokens", "memory", "rollout")
    maps = dataclasses.replace(maps, **{name: getattr(maps, name)[:1] for name in names})
    monkeypatch.setattr(attention_page, "_MAX_TOKENS", 3 * S)
    data = json.loads(Page(attention_page.attention_page(maps)).text)
    assert data["blocks"] == [0, 3, 4] and data["kept"] == [0] and data["lastBlock"] == 4


def test_a_page_that_cannot_be_made_says_why(monkeypatch):
    maps = make_maps()
    monkeypatch.setattr(attention_page, "_MAX_WEIGHTS", 1000)
    with pytest.raises(ConfigError, match="hold 440 queries, more than the limit of 250: keep fewer"):
        attention_page.attention_page(maps)
    with pytest.raises(ConfigError, match="There is nothing to show: no block was kept."):
        attention_page.attention_page(dataclasses.replace(maps, blocks=()))


TRACES = """
const {unpackData, traceToken, traceMemory, sees} = require(process.argv[1]);
const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
const plain = ({weights, start}) => ({
  weights: [...weights].map(([b, w]) => [b, [...w]]), start: [...start]});
unpackData(data).then(async decoded => {
  const rows = await decoded.map("3/1/2");
  console.log(JSON.stringify({
    tokens: [[0, 3], [3, 5], [4, 2]].map(([b, s]) => plain(traceToken(data, decoded, b, s))),
    memory: data.rows ? plain(traceMemory(data, decoded, 3, 1, 2)) : null,
    map: Array.from({length: rows.rows}, (_, r) => [...rows.row(r)]),
    seen: [0, 1, 3].map(b => [...Array(data.size).keys()].map(
      slot => [...Array(rows.columns).keys()].map(column => sees(data, b, slot, column)))),
  }));
});
"""


@pytest.mark.parametrize("changes", [{}, dict(window_mask=True), dict(memory=Memory())], ids=str)
def test_the_page_traces_as_python_does(changes):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    maps = make_maps(**changes)
    text = Page(attention_page.attention_page(maps)).text
    result = subprocess.run(
        [node, "-e", TRACES, DATA_JS], input=text, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    traces = [tracing.trace(maps, block, slot) for block, slot in ((0, 3), (3, 5), (4, 2))]
    if maps.memory.shape[3]:
        traces.append(tracing.trace_memory(maps.records, 3, 1, 2))
    for by_page, trace in zip([*found["tokens"], found["memory"]], traces):
        weights = dict(by_page["weights"])
        assert set(weights) == set(trace.weights)
        for block, row in trace.weights.items():
            np.testing.assert_allclose(weights[block], row, atol=1e-3)
        np.testing.assert_allclose(by_page["start"], trace.start.ravel(), atol=1e-3)
    np.testing.assert_allclose(found["map"], rows_of(json.loads(text)["maps"]["3/1/2"]), atol=1e-6)
    for block, seen in zip((0, 1, 3), found["seen"]):
        expected = attention_page_visible(maps, block)
        np.testing.assert_array_equal(seen, expected)


def attention_page_visible(maps, block):
    from famx.modules.attention import visible

    columns = np.arange(maps.tokens.shape[-1])
    return np.asarray(visible(maps, np.arange(S)[:, None], columns, max(M - block, 0)))


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a headless browser; returns its document, or the pixels of a picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
               "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1100"]  # fmt: skip

    def opened(page, selection, picture=False):
        path = tmp_path / "page.html"
        path.write_text(page)
        what = f"--screenshot={tmp_path / 'page.png'}" if picture else "--dump-dom"
        address = f"{path.as_uri()}#{selection}"
        out = subprocess.run(
            [*command, what, address], capture_output=True, text=True, timeout=300
        ).stdout
        return images.imread(tmp_path / "page.png")[..., :3] if picture else out

    return opened


def body(dom):
    return dom[dom.index("<body") : dom.index('<script id="data"')]


@pytest.mark.slow
def test_a_browser_shows_what_the_address_names(browse):
    maps = make_maps()
    page = attention_page.attention_page(maps)
    dom = body(browse(page, "block=3&slot=5&layer=1&head=0"))
    records, place = maps.records, maps.records.blocks.index(3)
    assert dom.count('class="memory"') == 5 and dom.count("data-slot=") == 4 * S + 3
    assert "&lt;/script&gt;" in dom and "Block 4 is incomplete: it has 3 of 8 tokens." in dom
    assert "so nothing of this block is in the memory" in dom and "Attention is not causation" in dom
    token = html.escape(maps.text(records.ids[place, 5]), quote=False)
    assert f"Token 3:5 “{token}”" in dom and f"has rank {records.rank[place, 5]} " in dom
    masses = maps.tokens[2, 1, 0, 5]
    (shown,) = re.findall(r"in layer 1, head 0: ([0-9.]+) on the memory", dom)
    np.testing.assert_allclose(float(shown), masses[:N].sum(), atol=0.02)
    assert dom.count("<canvas") == 2 * 5 + 1
    pixels = browse(page, "block=3&slot=5&layer=1&head=0", picture=True)
    for color in (MEMORY, PAST, OWN):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 200


CLICK = """<script>
const wait = () => document.body.dataset.ready === "yes"
  ? document.querySelector("%s").click() : setTimeout(wait, 20);
wait();
</script></body>"""


@pytest.mark.slow
def test_clicks_choose_tokens_memory_and_heads(browse):
    page = attention_page.attention_page(make_maps())
    click = lambda what, selection: body(browse(page.replace("</body>", CLICK % what), selection))
    dom = click("[data-block='3'][data-memory='1']", "block=2&slot=1&layer=1")
    assert "Memory token F1 of layer 1, as block 3 reads it" in dom
    assert "Written by the update after block 2: 0.50 of it" in dom and "strongest memory tokens" in dom
    # Maps of block 1 were not kept.
    dom = click("[data-block='2'][data-memory='0']", "block=2&slot=1&layer=1")
    assert "Attention of this update, mean over heads" in dom
    maps = make_maps()
    closed = np.zeros_like(maps.records.shares)
    records = dataclasses.replace(maps.records, shares=closed)
    page_closed = attention_page.attention_page(dataclasses.replace(maps, records=records))
    dom = body(browse(page_closed, "block=3&memory=1&layer=1"))
    assert "The update after block 2 wrote nothing into it" in dom
    dom = click("[data-block='0'][data-memory='0']", "block=2&slot=1")
    assert "No block of this text wrote it" in dom
    dom = click("input[value=trace]", "block=4&slot=2")
    assert "Traced back from block 4 to block 0." in dom and "strongest blocks" in dom
    dom = click("canvas[data-layer='1'][data-head='2']", "block=4&slot=2")
    assert "Block 4, layer 1, head 2" in dom
    dom = click("[data-block='1'][data-slot='2']", "block=4&slot=2")
    assert "The maps of block 1 were not kept" in dom
