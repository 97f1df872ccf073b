"""The end of the servers that the tests of this folder share; by its name the last file of them."""

import signal

import pytest
from conftest import PATIENCE_S, open_stream


@pytest.mark.parametrize("finishes", [True, False])
def test_shutdown_finishes_what_runs_or_ends_it_in_good_order(request, finishes):
    server = request.getfixturevalue("server" if finishes else "strict")  # 60 s or 1 s of grace
    n_wanted = 300 if finishes else 2000
    connection = open_stream(server, max_tokens=n_wanted)
    server.process.send_signal(signal.SIGTERM)
    received = b""
    while part := connection.recv(65536):
        received += part
    server.process.wait(PATIENCE_S)
    assert b'"finish_reason":"length"' in received
    assert b"data: [DONE]" in received
    assert (received.count(b"logprobs") > n_wanted / 2) == finishes
    assert not [line for line in server.log if "Traceback" in line]
