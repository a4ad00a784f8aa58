"""Make the recorded run: `PYTHON_OF_0.1 record.py SOURCE_OF_0.1 TARGET`, where Slurm is installed.

A sandbox of Slurm runs four steps of a tiny model, with an engine, the router and one trainer rank; the run is stopped
after the second step. Its spare job (`--chain 1`) never starts: its payload is what a later version has to
take over. Everything lies below /tmp/version_0_1, a name of eleven letters that a test can replace in the payload.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path("/tmp/version_0_1")
RUN = ROOT / "runs" / "add"
FLAGS = [
    *("--name=add", f"--runs-dir={ROOT / 'runs'}", "--partition=gpu", "--nodes=2", "--num-gpus-per-node=1"),
    *("--chain=1", "--slurm.python=python3", f"--hf-checkpoint={ROOT / 'model'}"),
    *(
        f"--prompt-data={ROOT / 'prompts.jsonl'}",
        "--label-key=label",
        "--rollout-shuffle",
        "--num-rollout=60",
    ),
    *("--rollout-batch-size=4", "--n-samples-per-prompt=2", "--rollout-max-response-len=6", "--lr=1e-3"),
    *("--custom-rm-path=rltrain.demo.task.reward", "--save-interval=1000"),
]
# What a test needs of the run, and what is text or small.
KEPT = ["config.toml", "run.json", "job.json", "job.sbatch", "status.json", "events.jsonl", "metrics.jsonl",
        "submitit/*_submitted.pkl", "rollouts/**/*.parquet", "rollouts_trainer/**/*.parquet"]  # fmt: skip


def main() -> None:
    """Make it."""
    source, target = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "tests")]
    from tiny_model import make_model

    from hpc.sandbox import ClusterSpec, Sandbox

    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    make_model(ROOT / "model")
    rows = [{"input": f"{i}+{i % 7}=", "label": str(i + i % 7)} for i in range(20)]
    (ROOT / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Sandbox(ROOT / "slurm", ClusterSpec(nodes=2, gpus=1, cpu_nodes=0), owner_pid=os.getpid()) as cluster:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {
            **cluster.env,
            "PATH": path,
            "PYTHONPATH": str(source),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        subprocess.run([sys.executable, "-m", "hpc.submit", *FLAGS], env=env, cwd=ROOT, check=True)
        until(lambda: lines(RUN / "metrics.jsonl") >= 2, "two steps")
        running = json.loads((RUN / "job.json").read_text())[0]["job_id"]
        cluster.run("scancel", "--batch", "--signal=INT", running)
        until(lambda: json.loads((RUN / "status.json").read_text())["phase"] == "stopped", "the stop")
        time.sleep(2)
        cluster.run("scancel", "--state=PENDING")
        print(cluster.run("squeue"))
    keep(target / "add")


def keep(target: Path) -> None:
    """Copy what is kept; the interpreter's place and the attempt's logs are left out."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in KEPT:
        for path in sorted(RUN.glob(pattern)):
            copy = target / path.relative_to(RUN)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name in ("job.sbatch", "run.json"):
        text = (target / name).read_text()
        (target / name).write_text(re.sub(r"\S*/bin/python3?\b", "python3", text))
    for attempt in sorted((RUN / "logs").glob("attempt_*")):
        log = target / "logs" / attempt.name / "supervisor.log"
        log.parent.mkdir(parents=True)
        log.write_text((attempt / "supervisor.log").read_text())


def lines(path: Path) -> int:
    """Lines of a file that need not exist yet."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(condition: object, what: str) -> None:
    """Wait at most five minutes."""
    deadline = time.monotonic() + 300
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            sys.exit(f"waited five minutes for {what}: see {RUN / 'logs'}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
