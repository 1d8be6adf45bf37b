"""Shards and where tests keep them: a local S3 server, and an HTTP server that counts and drops connections."""

import io
import random
import tarfile
import threading
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

KEY, SECRET = "AKIATESTKEY", "very-secret-value"


@cache
def jpeg(label, seed, side=40):
    """A coloured square that tells its class, under noise that tells its number."""
    rng = random.Random(f"{label} {seed}")
    image = Image.new("RGB", (side, side + 8), tuple(rng.randint(0, 80) + 160 * (c == label % 3) for c in range(3)))
    for _ in range(30):
        image.putpixel((rng.randrange(side), rng.randrange(side)), tuple(rng.randrange(256) for _ in range(3)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def pack(members):
    """A tar file's bytes of (name, bytes) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_shards(folder, count, images, classes=3, fill=0):
    """``count`` WebDataset shards of ``images`` images, as ``000.tar``, ...; ``fill``: bytes added to each."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        members = []
        for k in range(images):
            number = shard * images + k
            data = jpeg(number % classes, number) + random.Random(number).randbytes(fill)
            members += [(f"{number:05d}.cls", str(number % classes).encode()), (f"{number:05d}.jpg", data)]
        (folder / f"{shard:03d}.tar").write_bytes(pack(members))
    return folder


class WebServer:
    """Serves a folder over HTTP, ranges too; of the answers it drops a share, half of them in their middle.

    Attributes:
        requests: (method, path, Range header or None) of each answer begun. sent: bytes of content sent.
        drop: share of connections to drop. ranges: whether it honours Range. status: answer all with this.
    """

    def __init__(self, folder, drop=0.0):
        self.folder, self.drop, self.ranges, self.status = folder, drop, True, None
        self.requests, self.sent, self.dropped = [], 0, 0
        self._rng, self._lock = random.Random(0), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                owner.answer(self, body=True)

            def do_HEAD(self):
                owner.answer(self, body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler, body):
        with self._lock:
            self.requests.append((handler.command, handler.path, handler.headers.get("Range")))
            fate = self._rng.random() / self.drop if self.drop else 1
            self.dropped += fate < 1
        path = self.folder / handler.path.lstrip("/").partition("?")[0]
        if fate < 0.5:
            handler.close_connection = True
            return
        if self.status or not path.is_file():
            handler.send_response(self.status or 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data, asked = path.read_bytes(), handler.headers.get("Range")
        start, stop = 0, len(data)
        if asked and self.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, stop) if last else stop
        handler.send_response(206 if asked and self.ranges else 200)
        if asked and self.ranges:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        handler.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        handler.send_header("ETag", f'"{path.stat().st_mtime_ns}-{len(data)}"')
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        if body:
            part = data[start:stop]
            part = part[: len(part) // 2] if fate < 1 else part
            handler.wfile.write(part)
            with self._lock:
                self.sent += len(part)
        handler.close_connection |= fate < 1

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def s3_server(environment):
    """A local S3 server that the environment (``setenv(name, value)``) points to; yields a boto3 client of it."""
    import boto3
    from fsspec import get_filesystem_class
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    get_filesystem_class("s3").clear_instance_cache()  # of an earlier server
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        environment(name, value)
    try:
        yield boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    finally:
        server.stop()


def upload(client, bucket, folder, prefix=""):
    """The files of a folder as objects of a new bucket."""
    client.create_bucket(Bucket=bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        client.put_object(Bucket=bucket, Key=prefix + path.relative_to(folder).as_posix(), Body=path.read_bytes())
