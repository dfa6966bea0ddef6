"""A server that speaks as the dashboard of a Ray cluster does, and says what a real one says in trouble alone.

`tests/cli/test_jobs_on_a_cluster.py` holds the same command lines against a real one.
"""

from __future__ import annotations

import asyncio
import io
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import ray
from aiohttp import web

Handler = Callable[[web.Request], web.StreamResponse | None]


class JobServer:
    """Serves on a loopback port until `close`; what it says may be changed at any time."""

    def __init__(self) -> None:
        self.ray_version: str = ray.__version__
        self.head_ip = "127.0.0.1"
        self.jobs: dict[str, dict[str, Any]] = {}
        """Details by submission id."""
        self.log: dict[str, list[list[str | None]]] = {}
        """By submission id: for each connection what it is told before it breaks; the last one is not broken. One that
        is told None hears nothing more."""
        self.answer: web.Response | None = None
        """Given to everything, instead of what there is."""
        self.requests: list[str] = []
        """Method and path of each."""
        self.package = b""
        """The newest folder that was sent, a ZIP file."""
        self.ends_as: dict[str, str] = {}
        """Status that jobs of a kind have as soon as they are submitted; RUNNING for others."""
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """End it."""
        assert self._runner is not None
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, submission_id: str, status: str = "RUNNING", **metadata: str) -> None:
        """A job with what `submission.describe` says of a run called `vit`, keyword arguments aside."""
        known = {
            "run": "vit",
            "directory": "/shared/vit",
            "kind": "blocks",
            "version": "0.1.0",
            "config": "name: vit\n",
        }
        said = known | {"interpreters": '["python"]'} | metadata
        self.jobs[submission_id] = {
            "type": "SUBMISSION",
            "submission_id": submission_id,
            "status": status,
            "entrypoint": "",
            "message": f"Job is {status}.",
            "start_time": 1_700_000_000_000 + len(self.jobs),
            "metadata": {f"dbtrain.{key}": value for key, value in said.items()},
        }

    def names_in_package(self) -> list[str]:
        """Names of the files in the folder that was sent."""
        return zipfile.ZipFile(io.BytesIO(self.package)).namelist()

    def file_in_package(self, name: str) -> str:
        """One of them."""
        return zipfile.ZipFile(io.BytesIO(self.package)).read(name).decode()

    async def _start(self) -> int:
        app = web.Application(middlewares=[self._note], client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/packages/{protocol}/{name}", self._no_package),
                web.put("/api/packages/{protocol}/{name}", self._take_package),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._job),
                web.post("/api/jobs/{id}/stop", self._stop),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.answer is not None:
            return web.Response(status=self.answer.status, text=self.answer.text)
        response: web.StreamResponse = await handler(request)
        return response

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": self.ray_version, "ray_commit": "", "session_name": ""}
        )

    async def _nodes(self, request: web.Request) -> web.Response:
        node = {"node_id": "0", "node_ip": self.head_ip, "is_head_node": True, "state": "ALIVE", "node_name": "head"}
        node |= {"state_message": "", "resources_total": {}, "labels": {}}
        result = {"total": 1, "num_after_truncation": 1, "num_filtered": 1, "result": [node]}
        result |= {"partial_failure_warning": "", "warnings": []}
        return web.json_response({"result": True, "msg": "", "data": {"result": result}})

    async def _no_package(self, request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def _take_package(self, request: web.Request) -> web.Response:
        self.package = await request.read()
        return web.Response()

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        sent = await request.json()
        status = self.ends_as.get(sent["metadata"]["dbtrain.kind"], "RUNNING")
        self.jobs[sent["submission_id"]] = sent | {
            "type": "SUBMISSION",
            "status": status,
            "start_time": 1_800_000_000_000 + len(self.jobs),
            "message": f"Job is {status}.",
        }
        return web.json_response({"job_id": sent["submission_id"], "submission_id": sent["submission_id"]})

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def _stop(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["id"]]["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(filter(None, self.log[request.match_info["id"]][-1]))})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        parts = self.log[name]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for text in parts[0]:
            if text is None:
                del parts[0]
                await socket.receive()  # until it is closed from there
                return socket
            await socket.send_str(text)
        if len(parts) > 1:
            del parts[0]
            assert request.transport is not None
            request.transport.abort()
        else:
            self.jobs[name]["status"] = self.jobs[name].pop("ends_as", "SUCCEEDED")
        return socket
