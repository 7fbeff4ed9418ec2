"""A server that answers like Google Cloud Storage, as far as tensorstore asks, with objects in memory."""

import contextlib
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FakeGcs:
    """Buckets and objects, and the requests that were made.

    Args:
      buckets: names of the buckets.
      port: port of the server; 0: a free one.

    Attributes:
      objects: `{(bucket, name): (content, generation)}`.
      requests: `(method, path)` of each request.
      refuse: `refuse(method, bucket, name)` returns the status of a request that fails, or None.
    """

    def __init__(self, *buckets: str, port: int = 0):
        self.buckets, self.objects, self.requests = set(buckets), {}, []
        self.refuse = lambda method, bucket, name: None
        self.lock, self.generations = threading.Lock(), itertools.count(1)
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = _Server(("127.0.0.1", port), handler)

    @property
    def url(self) -> str:
        """What TENSORSTORE_GCS_HTTP_URL must be."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of objects that begin with a prefix, in order."""
        with self.lock:
            return sorted(n for b, n in self.objects if b == bucket and n.startswith(prefix))

    def content(self, bucket: str, name: str) -> bytes:
        """The content of an object."""
        return self.objects[bucket, name][0]

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Writes an object."""
        with self.lock:
            self.objects[bucket, name] = (content, next(self.generations))

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeGcs"]:
        """A context in which the server answers."""
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()


@pytest.fixture
def gcs(monkeypatch):
    """A `FakeGcs` with the bucket "bucket", which tensorstore takes for Google's."""
    with FakeGcs("bucket").running() as fake:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", fake.url)
        yield fake


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeGcs

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle("GET")

    def do_POST(self):
        self._handle("POST")

    def do_DELETE(self):
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.requests.append((method, urllib.parse.unquote(url.path)))
        match = re.fullmatch(r"/(?:upload/)?storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        if match is None:
            return self._fail(404)
        bucket = match[1]
        name = query.get("name") if method == "POST" else urllib.parse.unquote(match[2] or "")
        status = self.fake.refuse(method, bucket, name or "")
        if status or bucket not in self.fake.buckets:
            return self._fail(status or 404)
        if method == "GET" and not name:
            return self._list(bucket, query)
        with self.fake.lock:
            content, generation = self.fake.objects.get((bucket, name), (None, 0))
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != generation:
                return self._fail(412)
            if method == "POST":
                generation = next(self.fake.generations)
                self.fake.objects[bucket, name] = (body, generation)
            elif method == "DELETE" and content is not None:
                del self.fake.objects[bucket, name]
        if method == "POST":
            return self._json({"name": name, "generation": str(generation), "size": str(len(body))})
        if content is None:
            return self._fail(404)
        if method == "DELETE":
            return self._answer(204, b"")
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            return self._fail(304)
        return self._read(content, generation)

    def _read(self, content: bytes, generation: int) -> None:
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if found is None:
            return self._answer(200, content, headers)
        first, last = found[1], found[2]
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self._fail(416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._answer(206, content[start:stop], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        names = self.fake.names(bucket, query.get("prefix", ""))
        low, high = query.get("startOffset", ""), query.get("endOffset")
        names = [n for n in names if n >= low and (high is None or n < high)]
        first, most = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
        items = []
        for name in names[first : first + most]:
            with self.fake.lock:
                content, generation = self.fake.objects.get((bucket, name), (b"", 0))
            items.append({"name": name, "size": str(len(content)), "generation": str(generation)})
        page = {"kind": "storage#objects", "items": items}
        if first + most < len(names):
            page["nextPageToken"] = str(first + most)
        self._json(page)

    def _json(self, value) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, headers: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": {"code": status, "message": f"status {status}"}}).encode()
        self._answer(status, b"" if status == 304 else text, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
