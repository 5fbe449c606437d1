"""An hour of load on one server: errors, answers that are not right, and whether memory grows.

    python benchmarks/serving_hour.py OUT.json [--minutes 60] [--model zoo:llama] [--clients 8] [--slots 4] [--pool 200]
        [--prefix-cache 4] [--threads 1] [--seed 0]

First a server with one slot, steps of one token and nothing kept of earlier texts answers a pool of requests one after
another: what each is answered alone. Then that server ends, and another one, with several slots, has clients that send

- seven in ten: a request of the pool, streamed or whole; text, logprobs, ends and usage must be those, bit for bit;
- one in ten: a new request, twice; both answers must be the same;
- one in ten: a request that the client leaves, within the stream or before its answer comes;
- one in ten: a malformed request, which must be refused with its status, or a connection that breaks off.

Whatever else happens is an error. Four in five good requests are completions, of text, of tokens, or scored, the others
chats. The server's resident set, its threads and its open files are sampled 360 times. `growth` is the slope of a line
through the means of 20 equal stretches of samples behind the first fifth, with its 95 % confidence interval (Student's
t): means, since neighbouring samples are not independent. In the end nothing may be held any more.
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
from serving import Server
from serving_requests import BAD, RAW, TEMPLATE, events_of, good, joined, whole

from sparity.files import write_json
from sparity.measure.data.machine import describe

SAMPLES, STRETCHES, WARM = 360, 20, 0.2
T_95 = 2.101  # Student's t with STRETCHES - 2 degrees of freedom, 97.5 %
TOLD_TO_STOP = (0, 130)  # exit codes of a server
WRONG = (httpx.HTTPError, ValueError, KeyError, TypeError, OSError)


class Load:
    """Clients of one server.

    Args:
        url: of the server.
        alone: what each request of the pool is answered, by its number.
        seed: of what the clients do.

    Attributes:
        counts: of what was done.
        errors: in words.
        changed: numbers of requests whose answer was not that of the request alone.
    """

    def __init__(self, url, alone, seed=0):
        self.url, self.alone, self.draw = url, alone, random.Random(seed)
        self.counts, self.errors, self.changed, self._new = Counter(), [], [], len(alone)

    async def run(self, seconds, clients):
        """Send requests for some time; each client sends at least one."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=900, limits=limits) as client:
            end = time.monotonic() + seconds

            async def one():
                while True:
                    kind = self.draw.choices([self.known, self.new, self.leave, self.bad], [7, 1, 1, 1])[0]
                    try:
                        await kind(client)
                    except WRONG as error:
                        self.errors.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                    self.counts[kind.__name__] += 1
                    if time.monotonic() > end:
                        return

            await asyncio.gather(*(one() for _ in range(clients)))

    async def known(self, client):
        """A request of the pool."""
        number = self.draw.randrange(len(self.alone))
        self._compare(number, await ask(client, number, self.draw.random() < 0.5), self.alone[number])

    async def new(self, client):
        """A request that nobody sent before, twice."""
        self._new, number = self._new + 1, self._new
        self._compare(number, await ask(client, number, True), await ask(client, number, False))

    async def leave(self, client):
        """A request whose client leaves."""
        path, body = good(self.draw.randrange(len(self.alone)))
        body = {**body, "max_tokens": 200, "ignore_eos": True, "echo": False} if "prompt" in body else body
        if self.draw.random() < 0.5:
            async with client.stream("POST", path, json={**body, "stream": True}) as response:
                after = self.draw.randint(0, 12)
                async for _ in response.aiter_lines():
                    after -= 1
                    if after < 0:
                        return
        else:
            try:
                await client.post(
                    path, json=body, timeout=httpx.Timeout(900, read=self.draw.choice([0.001, 0.02, 0.1]))
                )
            except httpx.ReadTimeout:
                return

    async def bad(self, client):
        """A request that must be refused, or a connection that breaks off."""
        if self.draw.random() < 0.25:
            _, writer = await asyncio.open_connection(*self.url.removeprefix("http://").split(":"))
            writer.write(self.draw.choice(RAW))
            await writer.drain()
            await asyncio.sleep(self.draw.choice([0.0, 0.05]))
            writer.close()
            return
        path, body, status = self.draw.choice(BAD)
        response = await client.post(path, content=body)
        if response.status_code != status or set(response.json()["error"]) != {"message", "type", "param", "code"}:
            raise ValueError(f"{response.status_code} in place of {status}: {body[:80]!r}")

    def _compare(self, number, found, wanted):
        self.counts["answers compared"] += 1
        self.counts["tokens"] += found[1][1]
        if found != wanted:
            self.changed.append(number)


async def ask(client, number, stream):
    """The answer to the request of a number.

    Raises:
        ValueError: it has another status than 200, or ends before its time.
    """
    path, body = good(number)
    if not stream:
        response = await client.post(path, json=body)
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code} for request {number}: {response.text[:200]}")
        return whole(response.json())
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code} for the stream of request {number}")
        return joined(events_of([line async for line in response.aiter_lines()]))


async def answers_alone(url, pool):
    """What each request of the pool is answered, one after another."""
    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        return [await ask(client, number, False) for number in range(pool)]


def growth(samples):
    """The slope through samples (seconds, value), per hour, with its 95 % confidence interval; None of too few."""
    begin = samples[0][0] + WARM * (samples[-1][0] - samples[0][0])
    warm = [(at / 3600, value) for at, value in samples if at >= begin]
    if len(warm) < STRETCHES:
        return None
    cuts = [len(warm) * at // STRETCHES for at in range(STRETCHES + 1)]
    stretches = [warm[start:end] for start, end in pairwise(cuts)]
    x, y = ([statistics.fmean(one[part] for one in stretch) for stretch in stretches] for part in (0, 1))
    slope, start = statistics.linear_regression(x, y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (STRETCHES - 2)
    half = T_95 * (left / (statistics.variance(x) * (STRETCHES - 1))) ** 0.5
    return {"per_hour": slope, "low": slope - half, "high": slope + half}


def of_process(number):
    """Megabytes of a process's resident set, its threads and its open files."""
    folder = Path(f"/proc/{number}")
    text = (folder / "status").read_text()
    size, threads = (int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "Threads"))
    return size / 1000, threads, len(list((folder / "fd").iterdir()))


async def watched(load, process, seconds, clients):
    """Run the load -> samples [(seconds, megabytes, threads, files, answers compared)]."""
    begun, samples = time.monotonic(), []

    async def sample():
        while True:
            samples.append((time.monotonic() - begun, *of_process(process), load.counts["answers compared"]))
            if len(samples) % (SAMPLES // 20) == 0:
                words = f"{samples[-1][0] / 60:.1f} min: {dict(load.counts)}, {len(load.errors)} errors"
                print(f"{words}, {len(load.changed)} changed; {samples[-1][1]:.1f} MB", file=sys.stderr, flush=True)
            await asyncio.sleep(seconds / SAMPLES)

    watching = asyncio.create_task(sample())
    await load.run(seconds, clients)
    watching.cancel()
    return samples


async def held(url):
    """How many requests run or wait once all clients have gone, after ten seconds at most."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(100):
            text = (await client.get("/metrics")).text
            count = sum(map(float, re.findall(r"^sparity:num_requests_(?:running|waiting){.*} (\S+)$", text, re.M)))
            if not count:
                break
            await asyncio.sleep(0.1)
    return int(count)


def measured(options, folder):
    """What came of the load, with the samples of memory."""
    template = Path(folder) / "template.jinja"
    template.write_text(TEMPLATE)
    common = [folder, "--chat-template", str(template), "--context", "512"]
    single = argparse.Namespace(slots=1, threads=options.threads)
    server = Server(options.model, single, *common, "--step-tokens", "1", "--prefix-cache", "0")
    try:
        alone = asyncio.run(answers_alone(server.url, options.pool))
    finally:
        server.stop()
    server = Server(options.model, options, *common, "--prefix-cache", str(options.prefix_cache))
    greeting, load = server.said, Load(server.url, alone, options.seed)
    try:
        samples = asyncio.run(watched(load, server.process.pid, options.minutes * 60, options.clients))
        left, logged = asyncio.run(held(server.url)), server.said.removeprefix(greeting)
    finally:
        code = server.stop()
    return {
        "minutes": round(samples[-1][0] / 60, 2),
        "counts": dict(load.counts),
        "errors": len(load.errors),
        "first_errors": load.errors[:5],
        "changed": len(load.changed),
        "first_changed": load.changed[:5],
        "held_in_the_end": left,
        "exit_code": code,
        "logged": logged[:2000],
        "memory_mb": {"first": samples[0][1], "last": samples[-1][1], "most": max(one[1] for one in samples)},
        "growth_mb": growth([one[:2] for one in samples]),
        "threads": [samples[0][2], max(one[2] for one in samples)],
        "files": [samples[0][3], max(one[3] for one in samples)],
        "samples": samples,
    }


def main():
    """Load a server and write JSON; the exit code is 1 where something was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", default="zoo:llama")
    defaults = {"clients": 8, "slots": 4, "pool": 200, "prefix-cache": 4, "threads": 1, "seed": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options, folder)
    command = " ".join(["python", "benchmarks/serving_hour.py", *sys.argv[1:]])
    write_json(options.out, {"command": command, "machine": describe(), "processors": os.cpu_count(), **found})
    print({name: value for name, value in found.items() if name != "samples"})
    wrong = any(found[name] for name in ("errors", "changed", "held_in_the_end", "logged"))
    return int(wrong or found["exit_code"] not in TOLD_TO_STOP)


if __name__ == "__main__":
    sys.exit(main())
