"""llama.cpp as a peer: GGUF files served in a process of its own, which a bad file may abort.

Requests are (path, body) pairs, answers the JSON of llama.cpp's own HTTP server.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Request = tuple[str, Any]
SERVER = """
import json, os, sys, urllib.error, urllib.request
import xllamacpp

def serve(file, context):
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = context
    params.n_parallel = 1
    params.n_predict = 8
    params.warmup = False
    params.fit_params = False
    params.use_jinja = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Keys and values in float32 and attention spelled out: what is compared are the weights.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)

def answer(server, path, body):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        return {"error": error.read().decode()}

for file, context, requests in json.load(sys.stdin):
    server = serve(file, context)
    print("ANSWERS" + json.dumps([answer(server, *request) for request in requests]), flush=True)
    del server
os._exit(0)
"""


class Refused(Exception):
    """llama.cpp did not load a file; the end of its log is the message."""


def ask_all(
    questions: Sequence[tuple[Path, Sequence[Request]]], context: int = 96, seconds: float = 120
) -> list[list[Any]]:
    """For each file the answers to its requests, in order; raises `Refused` where one does not load."""
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps([(str(file), context, requests) for file, requests in questions]),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    if done.returncode or len(found) != len(questions):
        raise Refused(f"exit {done.returncode} after {len(found)} files: {done.stderr[-13000:]}")
    return [json.loads(line.removeprefix("ANSWERS")) for line in found]


def ask(file: Path, *requests: Request, context: int = 96, seconds: float = 120) -> list[Any]:
    """The answers of one file."""
    return ask_all([(file, requests)], context, seconds)[0]


def completion(ids: Sequence[int], tokens: int, vocabulary: int) -> Request:
    """A greedy continuation, with the log-probability of every token at every step."""
    body = {"prompt": list(ids), "n_predict": tokens, "n_probs": vocabulary, "return_tokens": True}
    return "/completion", {**body, "temperature": 0, "top_k": 1, "cache_prompt": False, "ignore_eos": True}


def log_probabilities(answer: Any, vocabulary: int) -> list[list[float]]:
    """Of every token, by id, at every step of a `completion`."""
    steps: list[list[float]] = []
    for step in answer["completion_probabilities"]:
        row = [float("nan")] * vocabulary
        for entry in step["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        steps.append(row)
    return steps
