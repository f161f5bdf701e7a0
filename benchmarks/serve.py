"""Measure `sfi-local serve` with SmolLM2 as docs/measured.md tells it: against generate() in this process, from memory, and many at once.

    python benchmarks/serve.py [--rows one,first,four,many,follow] [--llama-server PATH] > serve.json

one:   tokens/s of one stream over HTTP, and of generate() in this process, in turns
first: seconds to the first token where 8k tokens are in memory, over HTTP and in this process
four:  sum of tokens/s of four streams at depth 6k against one
many:  64 clients, 2,000 requests, half of them cancelled at random: statuses, and the memory before and after
follow: seconds of an 8k prompt and three follow-ups of 100 tokens, and with --llama-server those of llama.cpp's own server, by its program's path
Texts are Python's own documentation. A row is JSON on stdout; what it is doing goes to stderr.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from pydoc_data.topics import topics

from sfi_local import Sampling, load
from sfi_local.catalogue import find

TEXT = "\n\n".join(topics.values())
MODEL = "smollm2-135m"
ENDLESS = {0: -100.0, 2: -100.0}  # the tokens that end an answer


class Server:
    """`sfi-local serve` with options, or another program that serves at the address."""

    def __init__(self, *options: object, program: list[str] | None = None, address: str = ""):
        command = program or [sys.executable, "-m", "sfi_local", "serve", MODEL, "--port", "0", "--quiet", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=None if program else subprocess.PIPE, text=True)
        self.host = address or self.process.stdout.readline().split()[0].removeprefix("http://")
        while not self.is_ready():
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            return self.request("GET", "/health")[0] == 200
        except ConnectionError:
            return False

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, timeout=1800)

    def request(self, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
        connection = self.connection()
        connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def stream(self, prompt, n: int, **fields) -> tuple[list[float], str]:
        """(when each token came, the text)"""
        connection, times, text = self.connection(), [], ""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0, "logit_bias": ENDLESS, **fields}
        times.append(time.perf_counter())
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]) and choices[0]["finish_reason"] is None:
                times.append(time.perf_counter())
                text += choices[0]["text"]
        return times, text

    def memory(self) -> float:
        return float(next(line for line in self.request("GET", "/metrics")[1].decode().splitlines() if line.startswith("sfi_memory_bytes ")).split()[1])

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def tps(times: list[float]) -> float:
    """Of the tokens after the first: times[0] is when it was asked for."""
    return (len(times) - 2) / (times[-1] - times[1])


def tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def own_tokens(n: int, start: int = 0) -> list[int]:
    with load(MODEL, mode="dense", cache=False) as model:
        return model.tokenize(TEXT[start:start + 8 * n])[:n]


def one() -> dict:
    """In turns: one is measured while the other waits."""
    prompt, n = own_tokens(2000), 200
    server = Server("--mode", "sfi", "--ctx", 4096, "--parallel", 1)
    ours, over_http = [], []
    with load(MODEL, mode="sfi", n_ctx=4096) as model:
        sampling = Sampling(temp=0, logit_bias=ENDLESS)
        for i in range(6):
            times = [time.perf_counter()]
            for _ in model.generate(prompt, n=n, sampling=sampling):
                times.append(time.perf_counter())
            http_times, _ = server.stream(prompt, n)
            if i:  # the first reads the prompt
                ours.append(tps(times))
                over_http.append(tps(http_times))
            tell(f"one: in process {tps(times):.1f}, over HTTP {tps(http_times):.1f} tokens/s")
    server.end()
    a, b = statistics.median(ours), statistics.median(over_http)
    return {"row": "one", "depth": 2000, "in_process_tps": a, "http_tps": b, "ratio": b / a, "in_process": ours, "http": over_http}


def first() -> dict:
    prompt = own_tokens(8000)
    server = Server("--mode", "sfi", "--ctx", 8192, "--parallel", 1)
    ours, over_http = [], []
    with load(MODEL, mode="sfi", n_ctx=8192) as model:
        for i in range(16):
            asked = [*prompt, 100 + i, 200 + i, 300 + i]
            time.sleep(1)  # what was asked before is still being written to the store
            start = time.perf_counter()
            next(steps := model.generate(asked, n=4, sampling=Sampling(temp=0)))
            mine = time.perf_counter() - start
            steps.close()
            time.sleep(1)
            times, _ = server.stream(asked, 4)
            tell(f"first: in process {mine:.3f} s, over HTTP {times[1] - times[0]:.3f} s")
            if i:
                ours.append(mine)
                over_http.append(times[1] - times[0])
    server.end()
    a, b = statistics.median(ours), statistics.median(over_http)
    return {"row": "first", "depth": 8000, "in_process_s": a, "http_s": b, "ratio": b / a}


def four() -> dict:
    prompts = [own_tokens(6000, 40_000 * i) for i in range(4)]
    server = Server("--mode", "sfi", "--ctx", 8192, "--parallel", 4)
    for i, prompt in enumerate(prompts):
        server.stream(prompt, 2)
        tell(f"four: prompt {i} is read")
    alone = [tps(server.stream(prompt, 100)[0]) for prompt in prompts]
    found: dict[int, list[float]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: server.stream(prompts[i], 200)[0]})) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    start, end = max(times[1] for times in found.values()), min(times[-1] for times in found.values())
    rates = [sum(start <= t <= end for t in times) / (end - start) for times in found.values()]
    server.end()
    alone_tps = statistics.median(alone)
    return {"row": "four", "depth": 6000, "one_tps": alone_tps, "each_tps": rates, "ratio": sum(rates) / alone_tps,
            "slowest_of_mean": min(rates) / statistics.mean(rates)}


def many(n_clients: int = 64, n_requests: int = 2000, seconds: float = 600) -> dict:
    server = Server("--mode", "sfi", "--ctx", 2048, "--parallel", 4)
    counts: dict[str, int] = {}
    lock, left, until = threading.Lock(), iter(range(n_requests)), time.monotonic() + seconds
    memories = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            with lock:
                i = next(left, None)
            if i is None:
                return
            if i % 200 == 199:
                memories.append(server.memory())
                tell(f"many: {i + 1} requests, {memories[-1] / 1e6:.0f} MB")
            outcome = ask(rng)
            with lock:
                counts[outcome] = counts.get(outcome, 0) + 1

    def ask(rng: random.Random) -> str:
        at = rng.randrange(100_000)
        body = {"model": MODEL, "messages": [{"role": "user", "content": TEXT[at:at + rng.randrange(20, 400)]}], "max_tokens": rng.randrange(1, 12),
                "stream": rng.random() < 0.5}
        connection = server.connection()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            if rng.random() < 0.5:
                time.sleep(rng.random() * 2)
                connection.sock.close()
                return "cancelled"
            response = connection.getresponse()
            data = response.read()
            return str(response.status) if response.status != 200 or b"usage" in data or b"[DONE]" in data else "broken off"
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_clients)]
    start = time.monotonic()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    took = time.monotonic() - start
    while any(slot["state"] != "idle" for slot in json.loads(server.request("GET", "/slots")[1])["slots"]):
        time.sleep(0.1)
    memories.append(server.memory())
    status = server.request("GET", "/health")[1].decode()
    server.end()
    return {"row": "many", "clients": n_clients, "requests": sum(counts.values()), "seconds": took, "outcomes": counts,
            "memory_mb": [m / 1e6 for m in memories], "health": status}


def follow(llama_server: str | None = None) -> dict:
    server = Server("--ctx", 10_240, "--parallel", 1, "--no-cache")
    found = {"row": "follow", "depth": 8000, "seconds": followed(server)}
    if llama_server:
        address = f"127.0.0.1:{free_port()}"
        program = [llama_server, "-m", str(find(MODEL).path), "-c", "10240", "-np", "1", "-t", str(os.cpu_count()), "--port", address.split(":")[1],
                   "--log-disable"]
        found["llama_server_seconds"] = followed(Server(program=program, address=address))
        found["times_sooner"] = sum(found["llama_server_seconds"]) / sum(found["seconds"])
    return found


def followed(server: Server) -> list[float]:
    """Seconds of each of four answers, every one to all that was said before; the server ends."""
    prompt, times = TEXT[:33_000], []
    for question in ("", "\nAnd then?", "\nWhy?", "\nWhat else?"):
        prompt += question
        start = time.perf_counter()
        _, text = server.stream(prompt, 100)
        times.append(time.perf_counter() - start)
        prompt += text
        tell(f"follow: {times[-1]:.1f} s")
    server.end()
    return times


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


ROWS = {"one": one, "first": first, "four": four, "many": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="one,first,four,many")
    parser.add_argument("--llama-server", help="path of the program, for the row follow")
    asked = parser.parse_args()
    for name in asked.rows.split(","):
        row = follow(asked.llama_server) if name == "follow" else ROWS[name]()
        print(json.dumps({**row, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
