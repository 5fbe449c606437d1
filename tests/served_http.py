"""A server in a thread, as tests drive it."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
from openai import OpenAI

from sparity.serve.http.app import Limits, create_app
from sparity.serve.http.server import bind, server_of
from sparity.serve.served_model import open_model
from sparity.serve.service import Service

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'odd' or message.content == 'refuse' %}"
    "{{ raise_exception('no such role') }}{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


def open_llama(path="zoo:llama", **options):
    """`zoo:llama`, or a folder of it, ready to be served, with a chat template."""
    return open_model(
        path,
        **{"name": "llama", "slots": 4, "context": 256, "template": TEMPLATE, "prefix_bytes": 10**7, **options},
    )


class Served:
    """A server that runs: its address, and clients of it."""

    def __init__(self, url, service, key):
        self.url, self.service = url, service
        self.http = httpx.Client(base_url=url, timeout=30, headers={"authorization": f"Bearer {key}"} if key else None)
        self.client = OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=30)

    def post(self, path, content):
        """The answer to JSON, or to bytes as they are."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.http.post(path, content=raw)

    def refused(self, path, content):
        """Status and error of a request that is refused."""
        answer = self.post(path, content)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error["message"], error["param"]

    def wait(self, condition, seconds=10.0):
        """Until something is the case."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to be"
            time.sleep(0.005)


@contextmanager
def serving(models, guard=None, split=None, **limits):
    """A server of some models until the context closes."""
    service = Service(models, guard, split)
    server = server_of(create_app(service, Limits(**limits)))
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = "http://{}:{}".format(*listening.getsockname())
    served = Served(url, service, limits.get("key"))
    served.wait(lambda: server.started)
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(20)
        served.http.close()
        served.client.close()
        listening.close()
        assert not thread.is_alive()
        assert not service.alive
