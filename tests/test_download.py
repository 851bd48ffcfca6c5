"""``--weights imagenet``: downloaded once, from a server of our own; only good files are kept."""

import hashlib
import http.server
import importlib
import io
import threading
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet50_Weights, VGG16_Weights

from network import tiny_aff, tiny_cls
from tool.run.errors import DataError, UsageError
from tool.weights import describe, download, load_for_inference, load_for_training


def _state(net_class, seed=1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return net_class().state_dict()


def _saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


GOOD = _saved(_state(tiny_cls.Net))
SHA256 = hashlib.sha256(GOOD).hexdigest()
SERVED = {
    "good.pth": GOOD,
    f"hashed-{SHA256[:8]}.pth": GOOD,
    "changed-00000000.pth": GOOD,
    "page.pth": b"<html>moved</html>",
    "other.pth": _saved({"x": torch.ones(1)}),
    "infinite.pth": _saved({k: v / 0 for k, v in _state(tiny_cls.Net).items()}),
    "truncated.pth": GOOD[: len(GOOD) // 2],
}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = SERVED.get(self.path.strip("/"))
        if content is None:
            self.send_error(404)
            return
        self.server.served.append(self.path.strip("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(GOOD)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.served = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that downloads go to."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def start(server, cache, monkeypatch):
    """Start a network by ``imagenet`` from files of the server; returns it and the report."""

    def start(*names, net_class=tiny_cls.Net):
        urls = tuple(f"http://127.0.0.1:{server.server_port}/{name}" for name in names)
        monkeypatch.setitem(download.START_FILES, "the tiny network", urls)
        net, lines = net_class(), []
        load_for_training(net, "imagenet", lines.append)
        return net, lines

    return start


@pytest.mark.parametrize("name", ["good.pth", f"hashed-{SHA256[:8]}.pth"])
def test_file_is_downloaded_once_and_starts_both_networks(name, start, cache, server):
    for net_class in (tiny_cls.Net, tiny_aff.Net):
        net, lines = start(name, net_class=net_class)
        assert torch.equal(net.trunk0.weight, _state(tiny_cls.Net)["trunk0.weight"])
        assert f"/{name} (the tiny network classifier)" in lines[0]
    assert server.served == [name]
    assert [path.name for path in cache.iterdir()] == [name]
    assert (cache / name).read_bytes() == GOOD


BAD = ["absent.pth", "truncated.pth", "changed-00000000.pth", "page.pth", "other.pth"]


@pytest.mark.parametrize("name", [*BAD, "infinite.pth"])
def test_bad_file_is_not_kept_and_the_next_one_is_taken(name, start, cache):
    with pytest.raises(DataError) as error:
        start(name)
    for part in ("--weights imagenet: http://127.0.0.1:", f"/{name} cannot be used (", f"{cache}"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []
    _, lines = start(name, "good.pth")
    assert f"/{name} cannot be used" in lines[0]
    assert "/good.pth (" in lines[1]
    assert [path.name for path in cache.iterdir()] == ["good.pth"]


def test_damaged_file_in_the_cache_is_named(start, cache, server):
    cache.mkdir()
    (cache / "good.pth").write_bytes(GOOD[:1000])
    with pytest.raises(DataError, match=f"{cache}/good.pth: .*damaged"):
        start("good.pth")
    assert server.served == []


def test_every_real_network_has_start_weights_and_others_are_refused():
    for name in ("vgg16_cls", "vgg16_aff", "resnet38_cls", "resnet38_aff", "resnet50_aff"):
        with torch.device("meta"):
            state = importlib.import_module(f"network.{name}").Net().state_dict()
        assert describe(state).rpartition(" ")[0] in download.START_FILES
    urls = [url for urls in download.START_FILES.values() for url in urls]
    assert VGG16_Weights.IMAGENET1K_V1.url in urls
    assert ResNet50_Weights.IMAGENET1K_V1.url in urls
    with pytest.raises(UsageError, match=r"imagenet: there are none for network\.tiny_cls"):
        load_for_training(tiny_cls.Net(), "imagenet", print)
    with pytest.raises(UsageError, match="imagenet: is for training"):
        load_for_inference(tiny_cls.Net(), "imagenet", print)
