"""Images of a table by address: downloaded once, within a time and a size, failures counted and named.

python -m pytest tests/training/data/tables/test_downloads.py
"""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_vit import download as download_module
from hf_vit.download import download, is_address
from hf_vit.errors import HFViTError
from training.data.dataset import open_dataset
from training.data.tables import downloads


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        number = self.path.strip("/").partition(".")[0]
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
        elif number.isdecimal() or self.path == "/caf%C3%A9.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(int(number) if number.isdecimal() else 1))
        else:
            self.send_error(404)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{found.server_port}"
        yield found
        found.shutdown()


def test_a_download_ends_in_time_and_size(server, monkeypatch):
    assert download(f"{server.url}/3.png") == png(3)
    assert download(f"{server.url}/café.png") == png(1)
    monkeypatch.setattr(download_module, "MAX_SECONDS", 0.3)
    with pytest.raises(OSError, match=r"not complete after 0\.3 s"):
        download(f"{server.url}/slow")
    monkeypatch.setattr(download_module, "MAX_BYTES", 10)
    for path, message in (("3.png", "larger than"), ("none", "404"), ("short", "ended before the file did")):
        with pytest.raises(OSError, match=message):
            download(f"{server.url}/{path}")
    with pytest.raises(OSError, match=r"\w"):
        download("http://")
    assert is_address("HTTPS://a.org/b.png") and not is_address("file:///etc/passwd") and not is_address(3)


def test_a_table_of_addresses_is_downloaded_once_and_failures_are_counted(server, tmp_path):
    (tmp_path / "here.png").write_bytes(png(5))
    files = [*(f"{server.url}/{n}.png" for n in range(5)), "here.png", f"{server.url}/none.png"]
    table = pd.DataFrame({"url": files, "label": list("abababb")})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    options = {"cache_dir": tmp_path / "cache"}
    said, marks = [], set()
    for data in (str(tmp_path / "t.csv"), table, datasets.Dataset.from_pandas(table), str(tmp_path / "t.parquet")):
        root = None if isinstance(data, str) else tmp_path
        found = open_dataset(data, image_column="url", image_root=root, log=said.append, **options)
        marks.add(found.fingerprint)
        pixels = [int(np.asarray(found.read(n)[0])[0, 0, 0]) // 10 for n in range(6)]
        assert pixels == list(range(6)) and "could not be downloaded (HTTP Error 404" in found[6]["unreadable"]
    assert sorted(set(server.asked)) == sorted({*(f"/{n}.png" for n in range(5)), "/none.png"})
    assert server.asked.count("/0.png") == 1 and server.asked.count("/none.png") == 2 * 4  # tried again by each run
    assert said[0].startswith("5 of 6 addresses downloaded into ")
    assert "1 of 6 addresses could not be downloaded" in said[1] and "/none.png (HTTP Error 404" in said[1]
    with pytest.raises(HFViTError, match=r"1 of 7 images .* are missing: .*none.png; --on_decode_error skip"):
        open_dataset(str(tmp_path / "t.csv"), on_unreadable="stop", **options)


def test_images_and_addresses_in_one_list(server, tmp_path):
    data = [(f"{server.url}/1.png", "a"), (Image.open(io.BytesIO(png(2))), "b")]
    found = open_dataset(data, cache_dir=tmp_path)
    assert [int(np.asarray(found.read(n)[0])[0, 0, 0]) for n in range(2)] == [10, 20]


def test_nothing_that_can_be_downloaded_is_an_error(server, tmp_path):
    with pytest.raises(HFViTError, match="none of the 2 images that 'list' lists could be had: 2 of 2 addresses"):
        open_dataset([(f"{server.url}/a", "a"), (f"{server.url}/b", "b")], cache_dir=tmp_path)
