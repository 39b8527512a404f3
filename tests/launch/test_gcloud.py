"""launch/gcloud.py: the lines as gcloud would get them, read by the real gcloud where it is."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.launch.fakes import TWO_SLICES

REAL = shutil.which("gcloud")
ON = ["--zone=us-east5-b", "--project=my-project"]
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "spot": {"spot": True, "topology": "v5p-128"},
    "two": TWO_SLICES | {"reservation": "r", "topology": "v5e:16x16"},
}
CREATED = {
    "one": ("v6e-16", "v2-alpha-tpuv6e", ["--node-id=tiny"]),
    "spot": ("v5p-128", "v2-alpha-tpuv5", ["--node-id=tiny", "--spot"]),
    "two": (
        *("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ["--node-count=2", "--node-prefix=tiny", "--reserved"],
    ),
}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_what_travels_is_uploaded_and_the_slices_are_asked_for(setting, launched, engines):
    said = launched("gcloud", **SETTINGS[setting])
    assert said.exit_code == 0, said.err
    (_, upload, _, files), (_, create, _, _) = engines()
    assert upload[:6] == ["storage", "cp", "code.tar.gz", "job.yaml", "run.sh", "setup.sh"]
    assert upload[6].startswith("gs://my-bucket/post/launch/tiny-")
    assert {*files} == {"code.tar.gz", "job.yaml", "run.sh", "setup.sh", "start.sh"}
    accelerator, runtime, how = CREATED[setting]
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "tiny"),
        *(f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"),
        *how,
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--metadata-from-file=startup-script=start.sh",
        *ON,
    ]
    assert upload[6] in bytes.fromhex(files["start.sh"]).decode()


def test_a_slice_that_is_there_is_started_over_ssh_on_all_hosts(launched, engines):
    assert launched("gcloud", **TWO_SLICES, gcloud={"existing": True}).exit_code == 0
    lines = [words for _, words, _, _ in engines()]
    assert [words[:2] for words in lines[:2]] == [["storage", "cp"]] * 2
    for words, node in zip(lines[2:], ("tiny-0", "tiny-1"), strict=True):
        assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", node]
        assert words[5] == "--worker=all"
        assert words[6].startswith("--command=gcloud storage cat gs://my-bucket/post/launch/tiny-")
        assert words[6].endswith(".start.sh | sudo bash")
        assert words[7:] == ON


def test_status_logs_and_stop(launched, engines, monkeypatch):
    assert launched("gcloud", "status").exit_code == 0
    assert engines()[-1][1] == ["compute", "tpus", "queued-resources", "describe", "tiny", *ON]
    assert launched("gcloud", "logs").exit_code == 0
    line = "sudo journalctl --unit=posttrain-tiny --lines=1000 --follow --output=cat"
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "tiny"]
    assert engines()[-1][1] == [*ssh, "--worker=0", f"--command={line}", *ON]
    monkeypatch.setenv("STAND_IN_CODE", "1")  # a slice that never came: no host to tell
    assert launched("gcloud", "stop").exit_code == 1
    tell, delete = engines()[-2:]
    assert tell[1] == [*ssh, "--worker=all", "--command=sudo systemctl stop posttrain-tiny", *ON]
    assert delete[1][2:] == ["queued-resources", "delete", "tiny", "--force", "--quiet", *ON]
    assert launched("gcloud", "stop", gcloud={"existing": True}).exit_code == 0
    assert engines()[-1][1] == tell[1], "a slice that is the user's stays"


def test_the_start_script_starts_the_job_with_its_environment(launched, tmp_path, monkeypatch):
    """On a host made of stand-ins: the words of each command, and the environment of the unit."""
    secret = "gcloud) case $1 in secrets) echo s3cret;; esac;;"
    text = f"""#!/bin/bash
name=$(basename "$0"); echo "$name $*" >> "$RECORD"
case $name in {secret} mountpoint) exit 1;; systemd-run) shift 3; exec env -i "$@";; esac"""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "systemctl", "systemd-run", "mountpoint", "gcsfuse"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    mount, opt = tmp_path / "mount", tmp_path / "opt"
    said = launched(
        *("gcloud", "--dry-run"),
        env={"NOTE": "it's $(a) `b`"},
        secrets={"HF_TOKEN": "hf/key"},
        mount=str(mount),
        set=[f"data.sources.gsm8k.path={mount}/train.jsonl"],
        retries=4,
    )
    assert said.exit_code == 0, said.err
    start = said.out.partition("# file start.sh:\n")[2].partition("\n\ngcloud storage cp")[0]
    start = start.replace("/opt/", f"{opt}/")
    (opt / "posttrain-tiny" / "files").mkdir(parents=True)
    (opt / "posttrain-tiny" / "files" / "run.sh").write_text('env > "$RECORD.env"')
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    done = subprocess.run(["bash", "-c", start], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "record").read_text().splitlines()
    home = f"{opt}/posttrain-tiny"
    assert lines[0] == "systemctl stop posttrain-tiny"
    assert lines[1].endswith("/* files/")
    assert lines[3] == f"gcsfuse --implicit-dirs my-bucket {mount}"
    assert lines[4] == "gcloud secrets versions access latest --secret=hf --project=my-project"
    run = lines[-1]
    unit = "systemd-run --unit=posttrain-tiny --property=KillMode=mixed"
    assert run.startswith(f"{unit} --property=TimeoutStopSec=150 bash -c ")
    assert run.endswith(f" {home}/environment {home}/files/run.sh sft")
    passed = (tmp_path / "record.env").read_text().splitlines()
    wanted = {
        *("NOTE=it's $(a) `b`", "HF_TOKEN=s3cret", "RETRIES=4", "FREE=1", f"WORK={home}/work"),
        "JAX_PLATFORMS=tpu,cpu",
    }
    assert wanted <= {*passed}
    assert Path(home, "environment").stat().st_mode & 0o077 == 0
    assert "s3cret" not in said.out


class _Api(http.server.BaseHTTPRequestHandler):
    """Of Cloud TPU, as far as gcloud looks: every operation is done, every resource is there."""

    asked: list[tuple[str, str, Any]]  # the server's subclass has its own

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append((self.command, self.path.partition("?")[0], json.loads(body or "{}")))
        out: dict[str, Any] = {"name": "projects/p/locations/z/operations/o", "done": True}
        if self.command == "GET":
            out = {"name": "projects/p/locations/z/queuedResources/x", "state": {"state": "ACTIVE"}}
        text = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def real_gcloud(tmp_path, monkeypatch):
    """The real gcloud, whose Cloud TPU is here; gives what it asked for."""
    handler = type("Api", (_Api,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("token")
    settings = {
        "CONFIG": str(tmp_path / "gcloud"),
        "API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{server.server_address[1]}/",
        "AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
        "CORE_DISABLE_PROMPTS": "1",
        "CORE_CHECK_GCE_METADATA": "false",
        "CORE_DISABLE_USAGE_REPORTING": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"CLOUDSDK_{name}", value)
    yield handler.asked
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not REAL, reason="gcloud is not installed here")
def test_the_real_gcloud_asks_for_what_we_meant(real_gcloud, launched, engines, tmp_path):
    changes = TWO_SLICES | {"spot": True, "topology": "v5p:4x4x4"}
    launched("gcloud", **changes)
    launched("gcloud", "status", **changes)
    launched("gcloud", "stop", **changes)
    lines = [words for _, words, _, _ in engines() if "queued-resources" in words]
    Path(tmp_path / "start.sh").write_text("#!/bin/bash\n")
    for words in lines:
        done = subprocess.run([str(REAL), *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    asked = [a for a in real_gcloud if a[0] != "GET"]
    place = "projects/my-project/locations/us-east5-b"
    (posted, path, body), (deleted, gone, _) = asked
    assert (posted, path) == ("POST", f"/v2/{place}/queuedResources")
    assert body["spot"] == {}
    spec = body["tpu"]["nodeSpec"][0]
    assert spec["multisliceParams"] == {"nodeCount": 2, "nodeIdPrefix": "tiny"}
    assert spec["node"]["acceleratorType"] == "v5p-128"
    assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv5"
    assert spec["node"]["metadata"] == {"startup-script": "#!/bin/bash\n"}
    assert (deleted, gone) == ("DELETE", f"/v2/{place}/queuedResources/tiny")
