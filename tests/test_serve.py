"""The progress server: a real one, real HTTP, many clients, requests that are wrong."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from vrlt_fast.cli import main
from vrlt_fast.config import Config
from vrlt_fast.errors import DataError
from vrlt_fast.serve import MOST_BODY, ProgressServer
from vrlt_fast.serve_model import MOST_IMAGES, Answer, ProgressModel, Question

ROOT = Path(__file__).resolve().parent.parent
SAID = "<answer>40%</answer>"


def png(color, height=56, width=56, claimed=None):
    """A PNG file of one colour; ``claimed``: another (height, width) for its header."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    claimed_height, claimed_width = claimed or (height, width)
    head = struct.pack(">IIBBBBB", claimed_width, claimed_height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(color) * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(*colors):
    return [base64.b64encode(png(color)).decode() for color in colors]


@pytest.fixture(scope="module")
def config(tiny_folder):
    return Config.model_validate(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "prompt": {"grammar": "sole_r1", "think": False},
            "rollout": {"max_new_tokens": 12},
            "kernels": {"layers": "torch"},
        }
    )


@pytest.fixture(scope="module")
def model(config, one_torch_thread):
    """The tiny model, taught to say 40 % whatever it sees."""
    made = ProgressModel(config)
    info, module = made.lm.info, made.lm.module
    prompts = [made.prompt(Question(task, (png((9, 9, 9)),))) for task in ("open the door", "put it away")]
    texts = [p.text.replace("<|image_pad|>", "") for p in prompts]
    said = info.tokenizer(f"{SAID}<|im_end|>", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(module.model.language_model.parameters(), lr=2e-3)
    for step in range(60):
        asked = info.tokenizer(texts[step % 2], add_special_tokens=False)["input_ids"]
        logits = module(input_ids=torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(said))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made


@contextmanager
def running(model, **options):
    server = ProgressServer("127.0.0.1", 0, model, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server(model):
    with running(model) as made:
        yield made


def ask(server, body, method="POST", path="/progress", **headers):
    """Status and reply, which always is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, data, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def raw(server, data):
    """What comes back for these bytes, up to the end of the connection."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


def test_progress_comes_back(server):
    images = encoded((200, 0, 0), (0, 200, 0))
    assert ask(server, {"task": "open the box", "images": images}) == (200, {"progress": 0.4, "text": SAID})
    with_type = [f"data:image/png;base64,{images[0]}"]
    body = {"task": "\u00f6ffne die Kiste", "images": with_type, "previous": 0.25}
    assert ask(server, body, Content_Type="application/json; charset=utf-8")[0] == 200
    assert ask(server, b"", "GET", "/health") == (200, {"status": "ok"})


def test_what_says_nothing_has_no_progress(model):
    assert model.read("I can't see it") == Answer(None, "I can't see it")
    assert model.read("<answer>7%</answer>") == Answer(0.07, "<answer>7%</answer>")


def test_the_question_holds_what_was_sent():
    text = Question("close it", (b"", b""), 0.25).text
    assert "close it" in text
    assert "25 %" in text
    assert "The image shows" not in text
    assert "was done" not in Question("close it", (b"",)).text
    assert "The image shows" in Question("close it", (b"",)).text


def test_images_and_task_reach_the_model(model):
    """Prompts differ where something else is shown or asked, and images stand in order."""
    red, green = png((200, 0, 0)), png((0, 200, 0))
    one, other = model.prompt(Question("a", (red, green))), model.prompt(Question("a", (green, red)))
    assert one.media_key == other.media_key[::-1] != other.media_key
    assert torch.equal(one.ids, other.ids)
    assert [clip.kind for clip in one.media] == ["image", "image"]
    assert not torch.equal(one.ids, model.prompt(Question("a", (red, green), 0.5)).ids)
    assert not torch.equal(one.media[0].patches, one.media[1].patches)


def test_many_clients_get_their_own_answers(server, model, seed):
    """Answers of batches are those of one by one; the model works on several at a time."""
    rng = random.Random(seed)
    sizes = []
    plain = model._generate

    def counted(prompts):
        sizes.append(len(prompts))
        return plain(prompts)

    questions = [
        {"task": f"task {i}", "images": encoded(*(rng.choices(range(256), k=3) for _ in range(rng.randint(1, 3))))}
        for i in range(16)
    ]
    model._generate = counted
    try:
        with ThreadPoolExecutor(16) as clients:
            found = list(clients.map(lambda body: ask(server, body), questions))
    finally:
        del model._generate
    assert found == [ask(server, body) for body in questions]
    assert sum(sizes) == 16
    assert len(sizes) < 16
    assert max(sizes) <= 8


BAD = {
    "nothing": b"",
    "no json": b"{",
    "no utf-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "digits": b'{"previous": ' + b"1" * 6000 + b"}",
    "a list": [],
    "no task": {"images": encoded((0, 0, 0))},
    "blank task": {"task": " ", "images": encoded((0, 0, 0))},
    "long task": {"task": "x" * 4001, "images": encoded((0, 0, 0))},
    "token in the task": {"task": "see <|video_pad|>", "images": encoded((0, 0, 0))},
    "line in the task": {"task": "a\nb", "images": encoded((0, 0, 0))},
    "no images": {"task": "a"},
    "images no list": {"task": "a", "images": encoded((0, 0, 0))[0]},
    "empty images": {"task": "a", "images": []},
    "too many images": {"task": "a", "images": encoded((0, 0, 0)) * (MOST_IMAGES + 1)},
    "image no text": {"task": "a", "images": [1]},
    "image no base64": {"task": "a", "images": ["%%%"]},
    "image not ascii": {"task": "a", "images": ["\u00e4"]},
    "previous above": {"task": "a", "images": encoded((0, 0, 0)), "previous": 1.01},
    "previous text": {"task": "a", "images": encoded((0, 0, 0)), "previous": "1"},
    "previous true": {"task": "a", "images": encoded((0, 0, 0)), "previous": True},
    "previous nan": b'{"task": "a", "images": ["AAAA"], "previous": NaN}',
    "unknown field": {"task": "a", "images": encoded((0, 0, 0)), "pervious": 0.5},
}
BAD_IMAGES = {
    "empty": (b"", "VRLT-V02"),
    "text": (b"#EXTM3U\nfile:///etc/passwd\n", "VRLT-V02"),
    "gif": (b"GIF89a" + bytes(50), "VRLT-V02"),
    "cut": (png((9, 9, 9))[:60], "VRLT-V"),
    "head alone": (b"\x89PNG\r\n\x1a\n", "VRLT-V02"),
    "jpeg head alone": (b"\xff\xd8\xff\xe0\x00\x10", "VRLT-V02"),
    "bomb": (png((9, 9, 9), claimed=(60_000, 60_000)), "VRLT-V06"),
    "thin": (png((9, 9, 9), height=2, width=2000), "VRLT-V06"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_why(server, name):
    status, reply = ask(server, BAD[name])
    assert (status, reply["error"]["code"]) == (400, "VRLT-W03")
    assert reply["error"]["message"]
    assert "Traceback" not in json.dumps(reply)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(server, name):
    data, code = BAD_IMAGES[name]
    images = [*encoded((0, 0, 0)), base64.b64encode(data).decode()]
    status, reply = ask(server, {"task": "a", "images": images})
    assert status == 400
    assert reply["error"]["code"].startswith(code)
    assert reply["error"]["where"] == "images[1]"
    assert "/tmp" not in json.dumps(reply)


def test_a_prompt_longer_than_the_context(server):
    images = [base64.b64encode(png((i, i, i), 1000, 1000)).decode() for i in range(4)]
    status, reply = ask(server, {"task": "a", "images": images})
    assert (status, reply["error"]["code"]) == (400, "VRLT-W03")
    assert "context" in reply["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/other", {}, 404),
        ("GET", "/progress", {}, 404),
        ("PUT", "/progress", {}, 501),
        ("POST", "/progress", {"Content_Type": "text/plain"}, 415),
        ("POST", "/progress", {"Content_Length": "-1"}, 411),
        ("POST", "/progress", {"Content_Length": "\u0663"}, 411),
        ("POST", "/progress", {"Transfer_Encoding": "chunked"}, 411),
        ("POST", "/progress", {"Content_Length": str(MOST_BODY + 1)}, 413),
    ],
)
def test_other_requests(server, method, path, headers, status):
    headers = {name: value.encode("utf-8") for name, value in headers.items()}
    found, reply = ask(server, b"{}", method, path, **headers)
    assert found == status
    assert reply["error"]["message"]


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\n\n", b"GET\r\n\r\n", b"POST /progress HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http(server, data):
    assert b"Traceback" not in raw(server, data)
    assert ask(server, b"", "GET", "/health")[0] == 200


def test_a_token_where_there_is_one(model):
    body = {"task": "a", "images": encoded((0, 0, 0))}
    with running(model, token="right") as server:
        for wrong in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": b"Bearer \xff"},
        ):
            assert ask(server, body, **wrong)[0] == 401
        assert ask(server, body, Authorization="Bearer right")[0] == 200
        assert ask(server, b"x" * 30_000_000)[0] == 401
        assert ask(server, b"", "GET", "/health")[0] == 200


def test_requests_that_never_arrive_are_ended(model):
    """One that stops, and one that goes on, a byte now and then; the model isn't kept from others."""
    with running(model, read_s=0.15) as server:
        head = b"POST /progress HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        begin = time.monotonic()
        assert b" 408 " in raw(server, head + b"{")
        with socket.create_connection(server.server_address[:2], timeout=20) as slow:
            slow.settimeout(0.02)
            reply = b""
            while not reply and time.monotonic() < begin + 10:
                slow.sendall(b"G")
                try:
                    reply = slow.recv(10) or b"ended"
                except TimeoutError:
                    continue
                except ConnectionError:
                    reply = b"ended"
        assert time.monotonic() - begin < 5
        assert ask(server, b"", "GET", "/health")[0] == 200


def test_no_more_connections_than_there_is_room_for(model):
    with running(model) as server:
        held = [socket.create_connection(server.server_address[:2], timeout=20) for _ in range(32)]
        try:
            assert b" 503 " in raw(server, b"")
        finally:
            for connection in held:
                connection.close()
        until = time.monotonic() + 10
        while b" 200 " not in raw(server, b"GET /health HTTP/1.1\r\n\r\n") and time.monotonic() < until:
            time.sleep(0.005)
        assert ask(server, b"", "GET", "/health")[0] == 200


def test_a_failure_of_the_model_costs_its_request(model, caplog):
    prompts = [model.prompt(Question(task, (png((1, 2, 3)),))) for task in ("a", "bad", "c")]
    plain = model._generate

    def fails(some):
        if any("Task: bad" in p.text for p in some):
            raise RuntimeError("secret detail")
        return plain(some)

    model._generate = fails
    try:
        found = model.answer(prompts)
        assert [isinstance(one, Answer) for one in found] == [True, False, True]
        with running(model) as server:
            status, reply = ask(server, {"task": "bad", "images": encoded((0, 0, 0))})
    finally:
        del model._generate
    assert (status, "secret" in json.dumps(reply)) == (500, False)
    assert "secret detail" in caplog.text


def test_a_grammar_without_progress_is_refused(config):
    prompt = config.prompt.model_copy(update={"grammar": "tw_grpo"})
    with pytest.raises(DataError) as caught:
        ProgressModel(config.model_copy(update={"prompt": prompt}))
    assert caught.value.code == "VRLT-D14"


def test_the_command_serves_and_ends(tiny_folder):
    overrides = ["--model.device=cpu", "--model.dtype=float32", "--rollout.max_new_tokens=2", "--kernels.layers=torch"]
    command = [sys.executable, "-m", "vrlt_fast", "serve", str(tiny_folder), "--port", "0", *overrides]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+): POST /progress, GET /health\n", said)
        assert found, (said, process.stderr.read())
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        body = json.dumps({"task": "open it", "images": encoded((5, 6, 7))})
        connection.request("POST", "/progress", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, set(json.loads(response.read()))) == (200, {"progress", "text"})
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_a_port_in_use(tiny_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(tiny_folder), "--port", port, "--model.device", "cpu"]) == 2
    assert "VRLT-C02" in capsys.readouterr().err
    assert main(["serve", str(tiny_folder), "--port", "70000"]) == 2
    assert main(["serve", str(tiny_folder), "--host", "0.0.0.0"]) == 2
