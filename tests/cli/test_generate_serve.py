"""``generate`` and ``serve``."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

POINT = ["--device", "cpu"]


def test_generate_prints_text_and_its_uncertainty(bay, swag_run):
    words = ["generate", swag_run, "--prompt", "bag holds 3 red", "Answer", "--draws", "3", "--max-new-tokens", "4"]
    said = bay(*words)
    assert said.status == 0, said.err
    assert said.out.count("disagreement of the draws") == 2
    rows = [json.loads(line) for line in bay(*words, "--json").out.splitlines()]
    assert [row["prompt"] for row in rows] == ["bag holds 3 red", "Answer"]
    assert len(rows[0]["tokens"]) <= 4
    assert rows[0]["tokens"][0]["mutual_information"] >= 0


def test_generate_gives_each_draw_an_answer(bay, swag_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("bag holds 3 red\n\nAnswer\n", encoding="utf-8")
    words = ["generate", swag_run, "--input", prompts, "--each", "--do-sample", "--draws", "3", "--max-new-tokens", "3"]
    said = bay(*words)
    assert said.status == 0, said.err
    assert said.out.count("semantic entropy") == 2
    rows = [json.loads(line) for line in bay(*words, "--json").out.splitlines()]
    assert [len(row["answers"]) for row in rows] == [3, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate"], "name what to generate from"),
        (["generate", "RUN"], "at least one prompt"),
        (["generate", "RUN", "--input", "nowhere.txt"], "There is no file nowhere.txt"),
        (["generate", "RUN", "--prompt", "bag", "--chat"], "no chat template"),
        (["generate", "RUN", "--prompt", "bag", "--max-new-tokens", "999"], "more than the model's 128"),
        (["generate", "RUN", "--prompt", "bag", "--each", "--beams", "2", "--max-new-tokens", "2"], "num_beams"),
        (["serve"], "name what to serve"),
        (["serve", "RUN", "--draws", "9", "--most-draws", "3"], "more than --most-draws"),
        (["serve", "RUN", "--timeout", "0"], "--timeout must be a number of at least 0.001"),
        (["serve", "RUN", "--port", "99999"], "choose another --port"),
    ],
)
def test_what_cannot_be_done_is_said(refused, swag_run, words, said):
    assert said in refused(*(swag_run if word == "RUN" else word for word in words))


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(refused, swag_run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused("serve", swag_run, "--port", taken.getsockname()[1])


@pytest.mark.slow
def test_a_server_process_answers_and_stops_at_ctrl_c(swag_run):
    command = [sys.executable, "-m", "bayeslora", "serve", str(swag_run), "--port", "0", "--draws", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            line = server.stdout.readline()
            address = line.split(" at ")[1].split()[0]
            assert line.startswith("serving swag at http://127.0.0.1:")
            with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
                assert json.load(answer)["data"][0]["id"] == "swag"
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"<title>bayeslora</title>" in answer.read()
        finally:
            server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert "Traceback" not in out + err
