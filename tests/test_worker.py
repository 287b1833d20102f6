"""What a worker refuses: requests, tokens, calls, each in one line."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow.flight")

import pyarrow as pa
from pyarrow import flight

from pipeline import UserError
from pipeline.online import Loader
from pipeline.online.parts import LONGEST, MOST
from pipeline.online.turbo import fingerprint
from pipeline.service.worker import Server
from wire import JsonObject, answered, ask, client, options, right_request, running, serving, sized  # noqa: F401 – two are fixtures

TOKEN = "0123456789abcdef"
OTHER_TOKEN = "this worker has another token: give both sides the same file"


# Requests that are none


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol": 2}, "protocol version 2 asked for, 1 here; install the same Penstock on both sides"),
        ({"codec": "0" * 64}, "its JPEG decoder gives other pixels ({codec}) than yours ('000000000000'); {install}"),
        ({"identity": "0" * 64}, "dataset: another data set of that name: yours has the identity 000000000000, {own}"),
        ({"split": "text"}, "{root}: no split named 'text'; there are: train, val"),
        ({"mean": "centre"}, "object contains unknown field mean"),
        ({"views": "eleven"}, "views: invalid enum value 'eleven'"),
        ({"view": 257}, "images of 256 pixels; a view needs 257; build with --size 294, or take view=256 or less"),
        ({"view": 0}, "view: expected int >= 1"),
        ({"ids": [0, 41]}, "sample 41: the split 'train' has 41"),
        ({"owners": [0, 1, 41]}, "sample 41: the split 'train' has 41"),
        ({"owners": [0, 1]}, "owners: 2, for 3 ids"),
        ({"ids": [0] * (MOST + 1)}, f"ids: expected array of length <= {MOST}"),
        ({"ids": [-1]}, "ids[0]: expected int >= 0"),
        ({"ids": ["1"]}, "ids[0]: expected int, got str"),
        ({"seed": 2**64}, "seed: must be below 2⁶⁴"),
        ({"bad": [0] * 10**5}, f"a request of 300,375 bytes; at most {LONGEST:,}"),
        ({"data": "../dataset"}, "'../dataset': names no data set below this worker's folder"),
        ({"data": "/etc"}, "'/etc': names no data set below this worker's folder"),
        ({"data": "é" * 200}, "'{letters}: names no data set below this worker's folder"),
        ({"data": "other"}, "other: no such data set below this worker's folder"),
    ],
    ids=str,
)
def test_requests_that_are_refused(server: Server, dataset: Path, good: JsonObject, values: JsonObject, message: str):
    own = f"this worker's {good['identity'][:12]}; copy it, or name another"
    words = {"codec": fingerprint()[:12], "install": "install the same simplejpeg and pillow-simd on both sides"}
    with client(server.port) as asking:
        answer = ask(asking, json.dumps(good | values).encode())
        assert answer == ("refused", message.format(**words, own=own, root=dataset, letters="é" * 119))
        assert ask(asking, sized(good, 2)) == 2


@pytest.mark.parametrize("data", [b"", b"\x00\xff", b"[]", b"[" * 10**4, b'{"protocol": NaN}', b'{"protocol": 1e999}'])
def test_bytes_that_are_no_request(server: Server, good: JsonObject, data: bytes):
    with client(server.port) as asking:
        kind, message = answered(asking, data)
        assert kind == "refused"
        assert "\n" not in message
        assert ask(asking, sized(good, 2)) == 2


def test_links(dataset: Path, tmp_path: Path, good: JsonObject):
    """They may lead to other folders below the worker's, and not out of it."""
    shutil.copytree(dataset, tmp_path / "root/real/dataset")
    (tmp_path / "root/inside").symlink_to("real")
    (tmp_path / "root/outside").symlink_to(dataset.parent)
    with serving(tmp_path / "root") as server, client(server.port) as asking:
        for name in ("real", "inside"):
            assert ask(asking, json.dumps(good | {"data": f"{name}/dataset"}).encode()) == 3
        answer = ask(asking, json.dumps(good | {"data": "outside/dataset"}).encode())
        assert answer == ("refused", "'outside/dataset': names no data set below this worker's folder")


# Who may ask


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "this worker asks for a token: set PENSTOCK_FEED_TOKEN_FILE to its file"),
        (["Bearer 0123456789abcdeX"], OTHER_TOKEN),
        (["Bearer 0123456789abcdef "], OTHER_TOKEN),
        (["0123456789abcdef"], OTHER_TOKEN),
        ([""], OTHER_TOKEN),
        (["Bearer 0123456789abcdef", "x"], OTHER_TOKEN),
    ],
)
def test_wrong_tokens(dataset: Path, good: JsonObject, sent: list[str], message: str):
    with serving(dataset.parent, token=TOKEN) as server, client(server.port) as asking:
        wrong = flight.FlightCallOptions(timeout=20, headers=[(b"authorization", value.encode()) for value in sent])
        with pytest.raises(flight.FlightError) as caught:
            asking.do_get(flight.Ticket(sized(good, 1)), wrong).read_all()
        assert json.loads(caught.value.extra_info) == {"kind": "refused", "message": message}
        assert ask(asking, sized(good, 1), TOKEN) == 1


POINT = flight.FlightDescriptor.for_path("dataset")
MEBIBYTE = pa.record_batch([pa.array([b"x" * 2**20])], names=["view"])


def put(writer: flight.FlightStreamWriter, reader: object) -> None:
    """Send 100 MiB."""
    for _ in range(100):
        writer.write_batch(MEBIBYTE)
    writer.close()


def exchange(writer: flight.FlightStreamWriter, reader: object) -> None:
    writer.begin(MEBIBYTE.schema)
    put(writer, reader)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("do_action", lambda asking: list(asking.do_action(flight.Action("x", b"y"), options()))),
        ("list_actions", lambda asking: list(asking.list_actions(options()))),
        ("list_flights", lambda asking: list(asking.list_flights(b"", options()))),
        ("get_flight_info", lambda asking: asking.get_flight_info(POINT, options())),
        ("handshake", lambda asking: asking.authenticate_basic_token("a", "b", options())),
        ("do_put", lambda asking: put(*asking.do_put(POINT, MEBIBYTE.schema, options()))),
        ("do_exchange", lambda asking: exchange(*asking.do_exchange(POINT, options()))),
    ],
)
def test_other_calls(server: Server, name: str, call: Callable[[flight.FlightClient], Any]):
    with client(server.port) as asking:
        with pytest.raises(flight.FlightError) as caught:
            call(asking)
        message = f"a worker answers do_get alone, not {name}"
        assert json.loads(caught.value.extra_info) == {"kind": "refused", "message": message}


def test_encrypted(dataset: Path, good: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a certificate, a client that does not encrypt gets nothing; a consumer refuses one of another name."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=worker"
    line = [*words.split(), "-addext", "subjectAltName=DNS:worker", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    tls = (certificate.read_bytes(), key.read_bytes())
    with serving(dataset.parent, "grpc+tls://127.0.0.1:0", token=TOKEN, tls=tls) as server:
        trust = {"tls_root_certs": certificate.read_bytes(), "override_hostname": "worker"}
        with flight.FlightClient(f"grpc+tls://127.0.0.1:{server.port}", **trust) as asking:
            assert ask(asking, sized(good, 2), TOKEN) == 2
        with client(server.port) as asking:
            assert ask(asking, sized(good, 1), TOKEN) == ("", "")
        with flight.FlightClient(f"grpc+tls://127.0.0.1:{server.port}", **trust) as asking:
            assert ask(asking, sized(good, 1), "fedcba9876543210") == ("refused", OTHER_TOKEN)
        monkeypatch.setenv("PENSTOCK_FEED_CA", str(certificate))
        address = f"grpc+tls://127.0.0.1:{server.port}"
        with pytest.raises(UserError) as refused:
            Loader(dataset, workers=[address])
    reason = "Peer name 127.0.0.1 is not in peer certificate"
    remedy = "PENSTOCK_FEED_CA names a file of those that are"
    assert str(refused.value) == f"{address}: its certificate is not trusted ({reason}); {remedy}"
