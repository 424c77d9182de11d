"""`transformers serve` over the loopback, asked as OpenAI's clients ask."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from exchange import Json, answer

START_SECONDS, ANSWER_SECONDS = 120, 300


def task(job: Json, given: Json) -> Json:
    picture = base64.b64encode(Path(job["picture"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": job["question"]},
    ]
    settings = {"max_new_tokens": given["tokens"], "min_new_tokens": given["tokens"], "do_sample": False}
    asked = {"model": job["folder"], "messages": [{"role": "user", "content": content}], "stream": False, "max_tokens": given["tokens"]}
    asked |= {"temperature": 0, "generation_config": json.dumps(settings)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "NO_PROXY": "127.0.0.1"})
    try:
        _wait(f"http://127.0.0.1:{port}/health", server)
        data = json.dumps(asked).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/chat/completions", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=ANSWER_SECONDS) as reply:
            return {"text": json.loads(reply.read())["choices"][0]["message"]["content"]}
    finally:
        server.terminate()
        server.wait()


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(START_SECONDS):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urlopen(address, timeout=5):
                return
        except URLError:
            time.sleep(1)
    raise RuntimeError("the server did not start")


if __name__ == "__main__":
    answer({"run": task}, ("transformers", "fastapi", "torch"))
