"""A server under load: errors, memory, requests and tokens per second, of several models in turns.

    python benchmarks/serving.py [OUT.json] [--models zoo:llama,FOLDER] [--seconds 20] [--rounds 2] [--clients 8]
        [--rate 0] [--prompt 64] [--tokens 32] [--slots 8] [--threads 1]

For each model a `sparity serve` runs in a process of its own, and the models take turns, round by round, each with the
server to itself. Clients ask for streams one after another (closed loop), or at random times, --rate a second in all
(open loop, Poisson). Every prompt is new but for one in four, which begins as others did; half of the requests draw.
Tokens are those of the server's own usage. The first answer to a fixed request, alone, is compared with the answers to
the same request in the midst of the load: `changed` counts those that are not the same. Client and server share the
machine. Memory is the server's resident set after the first round and after the last.
"""

import argparse
import asyncio
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from results import save
from sparity.measure.data.machine import describe

FIXED = {"prompt": [7, 70, 77], "max_tokens": 16, "temperature": 1.0, "seed": 1, "ignore_eos": True}


@dataclass
class Numbers:
    """What came of the requests to one model."""

    errors: list = field(default_factory=list)
    changed: int = 0
    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    first: list = field(default_factory=list)
    between: list = field(default_factory=list)


class Server:
    """A `sparity serve` in a process of its own.

    Args:
        model: that it serves.
        options: `slots` and `threads`.
        folder: for what it writes; a pipe that nobody reads would fill and hold it up.
        more: arguments for it.
    """

    def __init__(self, model, options, folder, *more):
        command = [sys.executable, "-m", "sparity", "serve", model, "--port", "0", "--slots", str(options.slots)]
        command += ["--threads", str(options.threads), "--name", "model", *more]
        log, name = tempfile.mkstemp(dir=folder)
        self._log, self.process = Path(name), subprocess.Popen(command, stderr=log)
        os.close(log)
        while not (found := re.search(r"listening at (\S+)/v1 .*\n", self.said)):
            if self.process.poll() is not None:
                raise SystemExit(f"the server of {model} did not start: {self.said}")
            time.sleep(0.05)
        self.url = found[1]

    @property
    def said(self):
        """All that it wrote."""
        return self._log.read_text()

    @property
    def memory(self):
        """Megabytes of its resident set."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) / 1000

    def stop(self):
        """End it -> its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(600)


def request(random_numbers, options):
    """The body of one more request."""
    known = random_numbers.random() < 0.25
    numbers = random.Random(0) if known else random_numbers
    return {
        "prompt": [numbers.randrange(10, 8000) for _ in range(options.prompt)],
        "max_tokens": options.tokens,
        "ignore_eos": True,
        "temperature": random_numbers.choice([0.0, 1.0]),
        "seed": random_numbers.randrange(2**31),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(client, body, numbers):
    """One request, and what is noted of it."""
    begun, times, usage = time.perf_counter(), [], None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}")
            async for line in answer.aiter_lines():
                if '"error"' in line:
                    raise RuntimeError(line[:200])
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                    found = re.search(r'"usage": \{"prompt_tokens": (\d+), "completion_tokens": (\d+)', line)
                    usage = found.groups() if found else usage
        numbers.requests += 1
        numbers.prompt_tokens += int(usage[0])
        numbers.tokens += int(usage[1])
        numbers.first.append(times[0] - begun)
        numbers.between.append((times[-1] - times[0]) / max(int(usage[1]) - 1, 1))
    except (httpx.HTTPError, RuntimeError, TypeError) as error:
        numbers.errors.append(f"{type(error).__name__}: {error}")


async def load(url, numbers, seed, options):
    """One round."""
    draws, end = random.Random(seed), time.monotonic() + options.seconds
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        alone = (await client.post("/v1/completions", json=FIXED)).json()["choices"]

        async def check():
            while time.monotonic() < end:
                await asyncio.sleep(options.seconds / 10)
                numbers.changed += (await client.post("/v1/completions", json=FIXED)).json()["choices"] != alone

        async def client_of():
            while time.monotonic() < end:
                await ask(client, request(draws, options), numbers)

        begun, going = time.monotonic(), [asyncio.create_task(check())]
        if options.rate:
            while time.monotonic() < end:
                going.append(asyncio.create_task(ask(client, request(draws, options), numbers)))
                await asyncio.sleep(draws.expovariate(options.rate))
        else:
            going += [asyncio.create_task(client_of()) for _ in range(options.clients)]
        await asyncio.gather(*going)
        numbers.seconds += time.monotonic() - begun


def summary(numbers, memory, code):
    """One model's numbers as they are shown."""

    def share(times, of):
        return round(sorted(times)[min(int(of * len(times)), len(times) - 1)], 4) if times else None

    return {
        "errors": len(numbers.errors),
        "first_errors": numbers.errors[:3],
        "changed": numbers.changed,
        "requests": numbers.requests,
        "requests_per_second": round(numbers.requests / numbers.seconds, 3),
        "tokens_per_second": round(numbers.tokens / numbers.seconds, 2),
        "prompt_tokens_per_second": round(numbers.prompt_tokens / numbers.seconds, 2),
        "first_token": {"median": share(numbers.first, 0.5), "p95": share(numbers.first, 0.95)},
        "between_tokens": round(statistics.median(numbers.between), 4) if numbers.between else None,
        "memory_mb": [round(value, 1) for value in memory],
        "exit_code": code,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--models", default="zoo:llama")
    for name, default in (("seconds", 20.0), ("rate", 0.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in (("rounds", 2), ("clients", 8), ("prompt", 64), ("tokens", 32), ("slots", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    models = options.models.split(",")
    numbers, memory, codes = {model: Numbers() for model in models}, {model: [] for model in models}, {}
    with tempfile.TemporaryDirectory() as folder:
        servers = {model: Server(model, options, folder) for model in models}
        try:
            for turn in range(options.rounds):
                for model in models:
                    asyncio.run(load(servers[model].url, numbers[model], turn, options))
                    memory[model].append(servers[model].memory)
        finally:
            codes = {model: server.stop() for model, server in servers.items()}
    save(
        {
            "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
            "machine": describe(),
            "processors": os.cpu_count(),
            "models": {model: summary(numbers[model], memory[model], codes[model]) for model in models},
        },
        options.out,
    )


if __name__ == "__main__":
    main()
