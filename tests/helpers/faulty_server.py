"""A loopback file server that misbehaves on request: the counterpart of the download tests."""

import contextlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("cut", "cut_no_length", "cut_chunked", "flip", "503", "500", "429", "drop", "wrong_range",
          "ignore_range", "gzip", "new_etag", "stall", "redirect")  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        shared = self.server
        name = self.path.split("?")[0].lstrip("/")
        shared.requests.append((self.command, name, self.headers.get("Range")))
        shared.tokens.append((self.headers["Host"], self.headers.get("Authorization")))
        if name.startswith("api/"):
            fault = shared.api_faults.pop(0) if shared.api_faults else None
            return self.listing() if fault is None else self.misbehave(fault)
        name = re.sub(r"^datasets/([^/]+/[^/]+)/resolve/[0-9a-f]{40}/", r"datasets/\1/", name)
        data = shared.files.get(name)
        if data is None:
            return self.send_plain(404, b"")
        fault = shared.faults.pop(0) if body and shared.faults else None
        if fault in ("429", "500", "503", "drop", "redirect"):
            return self.misbehave(fault)
        etag = f'"{shared.etag + (fault == "new_etag")}"'
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = 0
        if found and fault not in ("ignore_range", "new_etag") and self.headers.get("If-Range", etag) == etag:
            start = int(found[1])
        if found and start >= len(data):
            return self.send_plain(416, b"")
        shown = start + (fault == "wrong_range")
        part = bytearray(data[shown:])
        if fault == "flip":
            part[len(part) // 2] ^= 1
        self.send_response(206 if found and (start or fault == "wrong_range") else 200)
        if found and (start or fault == "wrong_range"):
            self.send_header("Content-Range", f"bytes {shown}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", shared.commit)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if fault == "cut_chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif fault != "cut_no_length":
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            return None
        if fault in ("cut", "cut_no_length", "cut_chunked", "stall"):
            part = part[: max(1, len(part) * 2 // 3)]
            self.close_connection = True
        if fault == "cut_chunked":
            part = b"%x\r\n%b\r\n" % (len(part), bytes(part))
        with contextlib.suppress(OSError):
            for at in range(0, len(part), 1 << 14) if shared.pace else ():
                self.wfile.write(part[at : at + (1 << 14)])
                time.sleep(shared.pace)
            self.wfile.write(b"" if shared.pace else part)
            if fault == "stall":
                self.wfile.flush()
                time.sleep(0.6)
        return None

    def misbehave(self, fault):
        if fault == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "redirect":  # to another host name, as the hub does to its storage
            return self.send_plain(
                302, b"", {"Location": f"http://localhost:{self.server.server_address[1]}{self.path}"}
            )
        wait = self.server.retry_after.get(fault)
        return self.send_plain(int(fault), b"busy", {"Retry-After": wait} if wait else {})

    def listing(self):
        body = json.dumps(self.server.api).encode()
        self.send_plain(200, body, {"Content-Type": "application/json"})

    def send_plain(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(files, faults=(), api=None):
    """(server, url); server.faults are used up one a GET, server.requests lists what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.faults, server.api = dict(files), list(faults), api
    server.api_faults, server.tokens, server.pace = [], [], 0.0  # pace: seconds a 16 kB
    server.retry_after = {"429": "0", "503": "Fri, 21 Nov 2025 09:00:00 GMT"}  # in the past
    server.requests, server.etag, server.commit = [], 1, "c" * 40
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
