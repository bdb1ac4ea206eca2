"""--push_to_hub against a server that answers as the Hub's API does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants, hf_api

import train_senseflow_flux as script
from helpers import refused
from senseflow.errors import UserError


TOKEN = "hf_a_secret_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """Takes every file within the commit. With `server.full` it refuses commits."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        server = self.server
        server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            server.created.append(name)
            return self.answer({"url": f"{server.url}/me/{name}", "name": f"me/{name}", "id": "1"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if "/commit/" not in self.path:  # the check of the model card
            return self.answer({"warnings": [], "errors": []})
        if server.full:
            return self.answer({"error": "your storage is full"}, 403)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{server.url}/me/{server.created[-1]}/commit/{'0' * 40}"
        return self.answer({"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def answer(self, content: dict, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Message", content.get("error", ""))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def flags(teacher, data):
    model = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--report_to", "none"]
    return [*model, *"--gan_weight 0 --resolution 64 --max_sequence_length 16 --export_dtype fp32".split()]


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.created, server.files, server.tokens, server.full = [], {}, set(), False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")  # so that the token of a test ends with it
        yield server
        server.shutdown()


def test_the_export_is_uploaded_and_nothing_else_and_no_file_has_the_token(flags, tmp_path, hub, capsys, caplog):
    folder = tmp_path / "my-student"
    push = ["--rank", "2", "--max_train_steps", "1", "--push_to_hub", "--hub_token", TOKEN]
    push += ["--output_dir", str(folder)]
    script.main([*flags, "--validation_prompts", "a cat", "--checkpointing_steps", "1", *push])
    assert hub.created == ["my-student"] and hub.tokens == {f"Bearer {TOKEN}"}
    export = {"README.md", "pytorch_lora_weights.safetensors", "senseflow.json", "scheduler/scheduler_config.json"}
    assert set(hub.files) == export
    assert all((folder / name).read_bytes() == content for name, content in hub.files.items())
    assert b"folder = 'me/my-student'" in hub.files["README.md"]
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert len(written) > len(export) and not any(TOKEN.encode() in file.read_bytes() for file in written)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text

    hub.full = True  # a failed upload leaves the export, which a resumed run uploads
    exported = (folder / "README.md").read_bytes()
    again = ["--resume_from_checkpoint", "latest", "--hub_model_id", "team/student"]
    with pytest.raises(UserError, match=r"the upload has failed \(403 Forbidden: your storage is full") as failure:
        script.main([*flags, *push, *again])
    assert failure.value.exit_code == 1
    assert hub.created[-1] == "student" and exported != (folder / "README.md").read_bytes()
    hub.full = False
    script.main([*flags, *push, *again])
    assert b"folder = 'me/student'" in hub.files["README.md"]


@pytest.mark.parametrize(
    "case, code, needle",
    [
        ("no token", 2, "--push_to_hub: there is no token for the Hub; give --hub_token"),
        ("unreachable", 1, "--push_to_hub: out cannot be created ("),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_training(
    case, code, needle, flags, tmp_path, hub, capsys, monkeypatch
):
    monkeypatch.setattr(script, "train_iteration", None)
    token = [] if case == "no token" else ["--hub_token", TOKEN]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    refused(script, [*flags, "--push_to_hub", *token, "--output_dir", str(tmp_path / "out")], code, needle, capsys)
