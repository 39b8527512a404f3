"""Two processes that sample together: one runs the tools, and both go on from what they answered.

The file is run as a program, too: `python -m tests.sampling.test_two_processes DATA OUT PORT ID`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from posttrain.chat.templates import TEMPLATES
from posttrain.hosts import DistributedConfig, init_distributed
from posttrain.sampling.conversation import make_rollouts
from posttrain.tools import tool_of
from posttrain.train.answers import shared
from tests.sampling.scripted import SAMPLING, prompt, says, template

TURN = '<tool_call>{"name": "note", "arguments": {"word": "quince"}}</tool_call>'


def main(data: str, out: str, port: str, number: str) -> None:
    meet = DistributedConfig(coordinator=f"127.0.0.1:{port}", processes=2, process_id=int(number))
    init_distributed(meet)
    ran: list[str] = []

    def note(word: str) -> str:
        """Notes a word down."""
        ran.append(word)
        return f"process {number} noted {word} as number {len(ran)}"

    chat = template(Path(data), TEMPLATES["chatml"])
    engine = says(chat, TURN, TURN, "Done.")
    tools = {"note": tool_of(note)}
    rollouts = make_rollouts([prompt()], engine, chat, SAMPLING, n=2, tools=tools, share=shared)
    found = [[[*rollout.messages], rollout.tokens.tolist()] for rollout in rollouts]
    (Path(out) / f"{number}.json").write_text(json.dumps({"ran": ran, "found": found}))


def test_slow_tools_run_on_one_process_for_both(data_dir: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", __name__, str(data_dir), str(tmp_path), port]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    running = [subprocess.Popen([*command, number], env=env) for number in "01"]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert (first["ran"], second["ran"]) == (["quince"] * 4, [])
    assert first["found"] == second["found"]
    assert "process 0 noted quince" in first["found"][0][0][1]["content"]


if __name__ == "__main__":
    main(*sys.argv[1:])
