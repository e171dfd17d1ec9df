"""Checkpoints from the hub, through the real huggingface_hub client and a small server on the
loopback address that speaks the endpoints the client uses."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = ROOT / "tests" / "golden" / "nvila"


class Hub(ThreadingHTTPServer):
    """Repositories "owner/open" (one revision, "v1"), "owner/closed" (asks for a token); large
    files are on "another" host. `cut`: bytes of each large file after which the
    connection breaks once."""

    daemon_threads = True

    def __init__(self, cut: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut = cut
        self.was_cut: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.files = {
            str(file.relative_to(SOURCE)): file.read_bytes()
            for file in SOURCE.rglob("*")
            if file.is_file()
        }
        self.files |= {"pytorch_model.bin": b"pickle", "llm/model.ckpt": b"pickle", "a.py": b"evil"}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def elsewhere(self) -> str:
        """Another host, to the client, as that of the hub's large files is."""
        return f"http://localhost:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if re.match("/(api/models/)?owner/closed", path):
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo"})
        if re.fullmatch(f"/api/models/owner/open/revision/(v1|{COMMIT})", path):
            files = [{"rfilename": name} for name in hub.files]
            return self.reply_json({"id": "owner/open", "sha": COMMIT, "siblings": files})
        if path == f"/api/models/owner/open/tree/{COMMIT}":
            return self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                    for name, content in hub.files.items()
                ]
            )
        if match := re.fullmatch(f"/owner/open/resolve/{COMMIT}/(.*)", path):
            content = hub.files[match[1]]
            headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT}
            if not match[1].endswith(".safetensors"):
                return self.reply(200, content, headers, with_body)
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
            return self.reply(302, b"", headers | {"Location": f"{hub.elsewhere}/cdn/{match[1]}"})
        if path.startswith("/cdn/"):
            return self.reply_range(path, hub.files[path.removeprefix("/cdn/")], with_body)
        code = "RevisionNotFound" if path.startswith("/api/models/owner/open/") else "RepoNotFound"
        self.reply(404, b"", {"X-Error-Code": code})

    def reply_json(self, value) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply_range(self, path: str, content: bytes, with_body: bool) -> None:
        hub, asked = self.server, self.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        headers = {"ETag": f'"{oid(content)}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        short = hub.cut is not None and path not in hub.was_cut and with_body
        if short:
            hub.was_cut.add(path)
        self.reply(
            206 if asked else 200, content[start:], headers, with_body, hub.cut if short else None
        )

    def reply(
        self,
        status: int,
        body: bytes,
        headers: dict,
        with_body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with contextlib.suppress(OSError):
                self.wfile.write(body[:cut])
        self.close_connection = True


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub):
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def fetch(address: str, home, repo: str = "owner/open", revision: str | None = "v1", **env):
    """What `checkpoints.fetch` says, in a process of its own, for the client reads its settings at
    import."""
    code = (
        "import sys; from checkpoints import fetch\n"
        "try: print(fetch(sys.argv[1], sys.argv[2] or None))\n"
        "except FileNotFoundError as error: print('error:', error)\n"
    )
    env = {"PATH": os.environ["PATH"], "HF_ENDPOINT": address, "HF_HOME": str(home)} | env
    run = subprocess.run(
        [sys.executable, "-c", code, repo, revision or ""],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().split("\n")[-1]


def test_a_repository_is_fetched_without_pickles_and_then_kept(tmp_path):
    """At a revision, large files through a redirect, everything as it is; a second call and one
    without the hub find it in the cache."""
    with serving(Hub()) as hub:
        folder = fetch(hub.address, tmp_path)
        paths = [path for _, path, _ in hub.requests]
        assert "/api/models/owner/open/revision/v1" in paths
        assert "/cdn/llm/model.safetensors" in paths
        assert not [path for path in paths if re.search(r"\.(bin|ckpt|py)$", path)]
        wanted = {
            name: c for name, c in hub.files.items() if not name.endswith((".bin", ".ckpt", ".py"))
        }
        loaded = {name: open(f"{folder}/{name}", "rb").read() for name in wanted}
        assert loaded == wanted
        count = len(hub.requests)
        assert fetch(hub.address, tmp_path) == folder
        assert not [path for _, path, _ in hub.requests[count:] if "/cdn/" in path]
    assert fetch(hub.address, tmp_path) == folder  # nobody listens any more
    assert fetch(hub.address, tmp_path, HF_HUB_OFFLINE="1") == folder
    command = [sys.executable, ROOT / "sparsevila.py", "--model", "owner/open", "--revision", "v1"]
    env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [*command, "--max-new-tokens", "3"], env=env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and "visual tokens encoded" in run.stdout


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path):
    """The client keeps whole pieces of ten million bytes."""
    with serving(Hub(cut=15_000_000)) as hub:
        hub.files["llm/model.safetensors"] = bytes(range(256)) * 100_000
        folder = fetch(hub.address, tmp_path)
        asked = [range for _, path, range in hub.requests if path == "/cdn/llm/model.safetensors"]
        assert len(asked) == 2 and asked[0] is None
        assert 10_000_000 <= int(re.fullmatch(r"bytes=(\d+)-", asked[1])[1]) <= 15_000_000
        for name in (n for n in hub.files if n.endswith(".safetensors")):
            assert open(f"{folder}/{name}", "rb").read() == hub.files[name]


@pytest.mark.parametrize(
    "repo, revision, message",
    [
        ("owner/missing", None, "no repository of that name"),
        ("owner/open", "v2", "v2"),
        ("owner/closed", None, "hf auth login"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path, repo, revision, message):
    with serving(Hub()) as hub:
        line = fetch(hub.address, tmp_path, repo, revision)
    assert line.startswith(f"error: no folder {repo}, and") and message in line
