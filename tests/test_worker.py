"""What a worker refuses: requests, tokens, calls, each in one line; and what its consumer says then."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("pyarrow.flight")

import pyarrow as pa
from pyarrow import flight

from conftest import one_line
from pipeline import UserError, manifest
from pipeline.online import Loader, parts, turbo
from pipeline.online.loader import recipe_of
from pipeline.online.parts import LONGEST, MOST
from pipeline.online.turbo import fingerprint
from pipeline.service.worker import Server
from wire import JsonObject, answered, ask, client, options, right_request, running, serving, sized  # noqa: F401 – two are fixtures
from workers import (  # noqa: F401 – three are fixtures
    Worker,
    addresses,
    assert_same,
    loader,
    started,
    taken,
    three_workers,
    two_data_sets,
    two_without_shards,
)

TOKEN = "0123456789abcdef"
OTHER_TOKEN = "this worker has another token: give both sides the same file"


# Requests that are none


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol": 2}, "protocol version 2 asked for, 1 here; install the same Penstock on both sides"),
        ({"codec": "0" * 64}, "its JPEG decoder gives other pixels ('{codec}') than yours ('000000000000'); {install}"),
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


def test_an_earlier_worker_knows_every_key_unless_flips_are_off(dataset: Path, good: JsonObject):
    """It refuses others. `good` has the keys of November 2026."""
    data = manifest.load(dataset)
    for flips, more in ((True, set()), (False, {"flips"})):
        request = parts.template(data, "train", recipe_of(data, "alexnet", 3, {"flips": flips}), 3, 0)
        assert json.loads(msgspec.json.encode(request)).keys() - good.keys() == more


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
        ("'x'", lambda asking: list(asking.do_action(flight.Action("x", b"y"), options()))),
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
        message = f"a worker answers do_get and the action status, not {name}"
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


# What its consumer says


def refused(data: Path, *words: str, **options: Any) -> str:
    """Check that a loader, or else its first batch, is a mistake of the user's; return what it says at once."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught, loader(data, patience=20, **options) as batches:
        next(batches)
    assert time.monotonic() - began < 10
    return one_line(caught, *words)


SECRETS = {"CA": "holds no certificates (PEM)", "TOKEN_FILE": "not a token; write one line of letters and digits"}
WRONG = [("CA", ""), ("CA", "-----BEGIN CERTIFICATE-----"), ("TOKEN_FILE", "two words"), ("TOKEN_FILE", "ü")]


@pytest.mark.parametrize(("name", "content"), WRONG)
def test_secrets_that_are_none(alone: Path, tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret").write_text(content)
    monkeypatch.setenv(f"PENSTOCK_FEED_{name}", str(tmp_path / "secret"))
    text = refused(alone / "dataset", workers=["127.0.0.1:1"])
    assert text == f"{tmp_path}/secret: {SECRETS[name]}"


@pytest.mark.parametrize("address", ["local+127.0.0.1:1", "local"])
def test_local_decoding_wants_the_shards(alone: Path, address: str):
    reason = "the shards are not here; leave local out of the workers, or copy them"
    assert refused(alone / "dataset", workers=[address]) == f"{alone}/dataset: {reason}"


@pytest.mark.parametrize("token", [None, "another-secret"])
def test_the_token_is_the_workers(
    served: Path, alone: Path, tmp_path: Path, token: str | None, monkeypatch: pytest.MonkeyPatch
):
    """Also where another worker would answer, and where shards are here."""
    right, wrong = tmp_path / "token", tmp_path / "wrong"
    right.write_text("the-secret-of-all\n")
    wrong.write_text(token or "")
    with started(served, token="the-secret-of-all") as workers:
        with monkeypatch.context() as environment:
            environment.setenv("PENSTOCK_FEED_TOKEN_FILE", str(right))
            assert_same(taken(served / "dataset", 3), taken(alone / "dataset", 3, workers=addresses(workers)))
        if token:
            monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(wrong))
        for data in (alone, served):
            refused(data / "dataset", workers[0].address, "token", workers=addresses(workers))


def test_another_data_set_is_refused(small: Path, served: Path, crew: list[Worker], tmp_path: Path):
    """Another one of the same name; one that the worker has not; one outside its root, which it has."""
    shutil.copytree(small, tmp_path / "dataset")
    (served.parent / "outside").mkdir(exist_ok=True)
    shutil.copytree(served / "dataset", served.parent / "outside" / "dataset", dirs_exist_ok=True)
    refused(tmp_path / "dataset", crew[0].address, "identity", workers=addresses(crew[:2]), view=24)
    shutil.copytree(served / "dataset", tmp_path / "other")
    refused(tmp_path / "other", crew[0].address, "other", workers=addresses(crew[:1]))
    for name in ("../outside/dataset", "dataset/../../outside/dataset", "/etc"):
        refused(served / "dataset", crew[0].address, workers=[f"grpc://{crew[0].address}/{name}"])
    fed = taken(tmp_path / "other", 3, workers=[f"grpc://{crew[0].address}/dataset"])
    assert_same(taken(served / "dataset", 3), fed)


def test_one_refusal_among_workers_is_an_error(served: Path, alone: Path, crew: list[Worker], tmp_path: Path):
    """It is a mistake of the user's, as long as the loader begins."""
    (tmp_path / "none").mkdir()
    with started(tmp_path) as (other,):
        text = refused(alone / "dataset", workers=[crew[0].address, other.address])
        assert text == f"{other.address}: dataset: no such data set below this worker's folder"


def test_another_version_is_refused(alone: Path, crew: list[Worker], monkeypatch: pytest.MonkeyPatch):
    """Another protocol; a decoder of other pixels."""
    with monkeypatch.context() as other:
        other.setattr(parts, "PROTOCOL", 7)
        text = refused(alone / "dataset", workers=[crew[0].address])
        assert text.startswith(f"{crew[0].address}: protocol version 7 asked for, 1 here; ")
    monkeypatch.setattr(turbo, "fingerprint", lambda: "0" * 64)
    text = refused(alone / "dataset", workers=[crew[0].address])
    assert "its JPEG decoder gives other pixels" in text
