"""A Hub for tests: a server that keeps files in memory, to which the real client talks."""

import base64
import json
from hashlib import sha1
from http.server import BaseHTTPRequestHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as the client speaks to create, upload and download: small files, branches.

    ``files`` are those of the main branch by USER/NAME/PATH, and of another branch by USER/NAME@BRANCH/PATH. The token
    is hf_token, and its user is me.
    """

    files: dict[str, bytes] = {}
    private: dict[str, bool] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content, code=200):
        self.answer(code, json.dumps(content).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if "/resolve/" in self.path:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            branch, _, path = rest.partition("/")
            name = f"{self.branch_of(repo, branch)}/{path.partition('?')[0]}"
            if name not in self.files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no such file")
            body = self.files[name]
            return self.answer(200, body, ETag=f'"{sha1(body).hexdigest()}"', Content_Length=str(len(body)))
        repo = self.path.split("?")[0].removeprefix("/api/models/").split("/revision")[0].split("/tree")[0]
        siblings = [{"rfilename": f.removeprefix(f"{repo}/")} for f in self.files if f.startswith(f"{repo}/")]
        return self.answer_json({"id": repo, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        if self.headers["Authorization"] != "Bearer hf_token":
            return self.answer_json({"error": "Invalid username or password."}, 401)
        if self.path.startswith("/api/models/") and not self.path.startswith("/api/models/me/"):
            return self.answer_json({"error": "You don't have write access to this model"}, 403)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = "/".join(filter(None, [wanted.get("organization") or "me", wanted["name"]]))
            if not repo.startswith("me/"):
                return self.answer_json({"error": f"You don't have the rights to create a model under {repo}"}, 403)
            self.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"  # by the client's age
            return self.answer_json({"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.answer_json({"files": files})
        if "/commit/" in self.path:
            repo, branch = self.path.partition("?")[0].removeprefix("/api/models/").split("/commit/")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    name = f"{self.branch_of(repo, branch)}/{line['value']['path']}"
                    self.files[name] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self.answer_json({"type": "model"})

    def branch_of(self, repo, branch):
        return repo if branch in ("main", COMMIT) else f"{repo}@{branch}"

    def read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
