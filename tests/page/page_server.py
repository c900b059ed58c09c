"""The page's server as a process of its own, and sessions that speak to it as a browser does, without a browser."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import connect

ROOT = Path(__file__).parents[2]


@contextmanager
def page_server(limit=60):
    """(address, process) of a server that answers; it is stopped at the end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    command += [f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, limit)
        yield url, server
    finally:
        server.kill()  # asked politely it would first end what it computes for visitors who have left
        server.wait()


def wait_for(url, limit):
    """Until the server answers a request for the page."""
    end = time.monotonic() + limit
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 - our own http address
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


class Session:
    """One visitor: what was drawn last, and changes of inputs.

    Attributes:
        drawn: the elements of the last run, by their place on the page: what a browser shows once the run has ended.
        inputs: by label, those that were drawn.
        first: seconds of the first run, or until the element for which `until` is true; with `leaving`, the visitor
            waits for nothing else.
        exceptions: messages of the tracebacks that were drawn.
    """

    def __init__(self, url, query="", until=None, *, leaving=False):
        self._open = ExitStack()
        stream = url.replace("http", "ws") + "/_stcore/stream"
        self.socket = self._open.enter_context(
            connect(stream, subprotocols=["streamlit"], max_size=None, open_timeout=30, close_timeout=0.1)
        )
        self.query, self.states = query, {}
        self.drawn, self.inputs, self.exceptions = {}, {}, []
        self.first = self.run(until, leaving=leaving)

    def run(self, until=None, *, leaving=False):
        """Run the page; seconds until it is drawn, or until an element for which `until` is true."""
        message = BackMsg()
        message.rerun_script.query_string = self.query
        message.rerun_script.widget_states.widgets.extend(self.states.values())
        start = time.perf_counter()
        self.socket.send(message.SerializeToString())
        found = None
        while True:
            answer = ForwardMsg.FromString(self.socket.recv(timeout=120))
            kind = answer.WhichOneof("type")
            if kind == "new_session":  # a run begins: what it does not draw again will go
                self.drawn = {}
            if kind == "delta" and answer.delta.WhichOneof("type") == "new_element":
                element = answer.delta.new_element
                self.drawn[tuple(answer.metadata.delta_path)] = element
                self._note(element)
                if found is None and until is not None and until(element):
                    found = time.perf_counter() - start
                    if leaving:
                        return found
            if kind == "script_finished" and answer.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                return found if until is not None else time.perf_counter() - start

    def _note(self, element):
        kind = element.WhichOneof("type")
        drawn = getattr(element, kind)
        if kind == "exception":
            self.exceptions.append(drawn.message)
        if hasattr(drawn, "id") and hasattr(drawn, "label"):
            self.inputs[drawn.label] = drawn

    def change(self, label, value, until=None):
        """Set the input `label`; as `run`."""
        drawn = self.inputs[label]
        if isinstance(value, str):
            state = WidgetState(id=drawn.id, string_value=value)
        else:
            state = WidgetState(id=drawn.id, double_value=value)
        self.states[drawn.id] = state
        return self.run(until)

    def metric(self, label):
        """The value of a metric."""
        found = [e.metric.body for e in self.drawn.values() if e.WhichOneof("type") == "metric"
                 and e.metric.label == label]  # fmt: skip
        return found[-1]

    def close(self):
        self._open.close()


def is_metric(label):
    """Whether an element is the metric `label`."""
    return lambda element: element.WhichOneof("type") == "metric" and element.metric.label == label


def resident(process):
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
