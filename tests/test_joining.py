"""A process that joins others, before it is one of them."""

import socket

import pytest

from jaxgpt import processes
from jaxgpt.errors import InputError
from jaxgpt.parallel_settings import ProcessSettings


def test_who_waits_for_the_first_process_is_told_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(processes, "_PATIENCE", 1.5)
    monkeypatch.setattr(processes, "_SILENCE", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = ProcessSettings(distributed=True, coordinator_address=address, num_processes=2, process_id=1)
        message = f"^--coordinator-address {address} cannot be reached .*; process 0 must run there"
        with pytest.raises(InputError, match=message), processes.joined(settings):
            raise AssertionError("joined nobody")
    assert capsys.readouterr().err == f"waiting at {address} for the other processes of this run, 1.5 s at most\n"


def test_the_first_process_is_reached_once_it_listens():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        processes._reach(f"[::1]:{server.getsockname()[1]}", until=0)
        connection, address = server.accept()
        connection.close()
    assert address[0] == "::1"


def test_a_name_that_is_none_is_refused_at_once():
    with pytest.raises(InputError, match=r"^--coordinator-address a\.\.b:1 cannot be reached"):
        processes._reach("a..b:1", until=float("inf"))
