"""The page of demo.py: its answers, and the whole of it in a browser."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import Page, find_chromium
from commands import DATA, ENVIRONMENT, REPO
from PIL import Image
from test_pictures import photograph

import demo
from datamodules.files.finding import load
from pictures.cleaning import as_fashion_mnist

CHROMIUM = find_chromium()
LENET = REPO / "weights" / "lenet.ckpt"
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the package gradio is missing")


def photo(index):
    """A test image as a photograph."""
    return photograph(load(DATA, "test")[0][index].numpy(), np.random.default_rng(index))


@pytest.fixture(scope="module")
def page():
    """The module; what Gradio's packages deprecate among themselves is theirs."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pictures import page
    return page


@needs_gradio
def test_networks_answer_beside_each_other(page, trained):
    networks = page.load_networks([LENET, trained.best])
    assert [network.title for network in networks] == [f"lenet ({LENET})", f"lenet ({trained.best})"]
    assert "61,706 parameters" in networks[0].facts
    assert "test accuracy" in networks[0].facts
    assert "test accuracy" not in networks[1].facts  # no list tells
    seen, *parts = page.answers(networks, photo(1))
    image = as_fashion_mnist(photo(1))
    assert np.array_equal(np.asarray(seen.resize((28, 28), Image.Resampling.NEAREST)), image)
    for network, shares, heat in zip(networks, parts[::2], parts[1::2], strict=True):
        expected = network.classifier.probabilities(network.data.preprocess(page.torch.from_numpy(image)[None]))[0]
        assert list(shares.values()) == expected.tolist()
        assert np.ptp(np.asarray(heat).reshape(-1, 3), axis=0).min() > 50  # neither blank nor grey alone
    assert parts[0] != parts[2]
    assert max(parts[0], key=parts[0].get) == "Pullover 套头衫"
    assert page.answers(networks, None) == [None] * 5


def test_mistakes_answer_with_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    cases = [
        ([], "the page needs the package gradio: pip install -r requirements-extras.txt"),
        (["--port=0"], "--port must be an integer from 1 to 65535, got 0"),
        (["--prot=80"], "unrecognized arguments: --prot=80 (python demo.py --help)"),
    ]
    for arguments, message in cases:
        assert demo.main(arguments) == 2
        assert capsys.readouterr().err == f"demo.py: error: {message}\n"
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path)
    assert demo.main([]) == 2
    assert "holds no weights; give the checkpoints of trained networks" in capsys.readouterr().err


@needs_gradio
def test_taken_port_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main([f"--port={port}"]) == 1
    expected = f"demo.py: error: 127.0.0.1:{port} can't be used: Address already in use; give another --port or --host"
    assert capsys.readouterr().err.splitlines() == [expected]


@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_the_answers(trained, page, tmp_path):
    photo(1).save(tmp_path / "photo.jpg", quality=80)
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(REPO / "demo.py"), str(LENET), str(trained.best), f"--port={port}"]
    environment = {**ENVIRONMENT, "TMPDIR": str(uploads)}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    browser = None
    try:
        assert server.stdout is not None
        assert f"Open http://127.0.0.1:{port} in a browser" in server.stdout.readline()
        browser = Page(str(CHROMIUM), tmp_path / "profile")
        browser.send("Page.navigate", url=f"http://127.0.0.1:{port}")
        browser.wait("document.querySelector('#photograph input[type=file]') !== null")
        browser.upload("#photograph input[type=file]", tmp_path / "photo.jpg")
        shown = "[...document.querySelectorAll('.square img')].filter(image => image.naturalWidth > 0)"
        browser.wait(f"{shown}.length == 3")
        answers = json.loads(
            browser.evaluate(
                "JSON.stringify([...document.querySelectorAll('.answer')].map(answer => "
                "[...answer.querySelectorAll('.confidence-set')].map(row => row.innerText)))"
            )
        )
        networks = page.load_networks([LENET, trained.best])
        for rows, network in zip(answers, networks, strict=True):
            shares, _ = network.explain(as_fashion_mnist(Image.open(tmp_path / "photo.jpg").convert("RGB")))
            top = sorted(shares, key=lambda name: -shares[name])[:3]
            assert [row.split("\n")[0] for row in rows] == top
            assert [int(row.split("\n")[-1].rstrip("%")) for row in rows] == [round(100 * shares[name]) for name in top]
        assert {urlsplit(address).netloc for address in browser.requests} == {f"127.0.0.1:{port}"}
        assert browser.errors == []
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert not [path for path in uploads.iterdir() if not path.name.startswith("torchinductor")]  # PyTorch's own
    finally:
        server.kill()
        server.communicate()
        if browser:
            browser.close()
