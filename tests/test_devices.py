"""Which devices a process takes: those that were named, or its own of what the machine has."""

import pytest
import torch

from pipeline import UserError
from trainer.devices import choose_devices, default_devices


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets how many GPUs there are, this process's number, and how many there are."""

    def make(gpus: int, rank: int, processes: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return make


@pytest.mark.parametrize(
    ("gpus", "rank", "processes", "columns", "expected"),
    [
        (0, 3, 4, 1, "cpu"),
        (1, 0, 1, 2, "cuda:0,cuda:0"),
        (8, 0, 1, 2, "cuda:0,cuda:1"),
        (8, 3, 4, 2, "cuda:6,cuda:7"),  # LOCAL_RANK r has 2r and 2r + 1
        (3, 1, 2, 2, "cuda:1,cuda:1"),  # a whole replica on each
        (8, 7, 8, 1, "cuda:7"),
    ],
)
def test_the_default_is_a_process_s_own(machine, gpus, rank, processes, columns, expected):
    machine(gpus, rank, processes)
    assert default_devices(columns) == expected


def test_more_processes_than_gpus(machine):
    machine(2, 2, 3)
    with pytest.raises(UserError, match=r"3 processes on this machine, which has 2 CUDA devices; start at most 2"):
        default_devices()


def test_each_process_takes_its_own_of_those_named(machine):
    names = [torch.device("cuda", number) for number in (3, 2, 1, 0)]
    for rank in (0, 1):
        machine(4, rank, 2)
        assert list(choose_devices("cuda:3,cuda:2,cuda:1,cuda:0")) == names[2 * rank : 2 * rank + 2]
        assert choose_devices("cpu,cpu") == (torch.device("cpu"),) * 2  # a CPU may be shared
        assert choose_devices("cuda:0,cuda:0,cuda:3,cuda:3") == (torch.device("cuda", 3 * rank),) * 2
        for named, shared in (
            ("cuda:0,cuda:1", "cuda:0 and cuda:1"),
            ("cuda:0,cuda:1,cuda:1,cuda:2", "cuda:1"),  # which NCCL would refuse in its own words
        ):
            with pytest.raises(UserError, match=f"2 processes on this machine would share {shared}; name 4, 2 for"):
                choose_devices(named)
        with pytest.raises(UserError, match=r"3 given; .*for each of the 2 processes on this machine"):
            choose_devices("cuda:0,cuda:1,cuda:2")


@pytest.mark.parametrize(("rank", "processes"), [("x", "2"), ("2", "2"), ("0", "")])
def test_numbers_that_torchrun_never_sets(monkeypatch: pytest.MonkeyPatch, rank: str, processes: str):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    with pytest.raises(UserError, match=f"LOCAL_RANK={rank}, LOCAL_WORLD_SIZE={processes}: must be"):
        default_devices()


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("cpu", 2, "1 given; the network has two columns"),
        ("cpu,cpu", 1, "2 given; the network has one column"),
        ("cpu,tpu9", 2, "not a device"),
        ("cuda:63,cpu", 2, "cuda:63.*or name cpu"),
    ],
)
def test_impossible_devices(text: str, columns: int, message: str):
    with pytest.raises(UserError, match=message):
        choose_devices(text, columns)
