"""What reading a run costs, as ratios: `python benchmarks/analysis_reading.py [--steps 10000]` (2 GB of files).

- runs of 100 samples a step, `--steps` steps with responses of 32 tokens and `--long-steps` with 512, to the scalar
  frame: against pyarrow reading the same columns raw, and against pandas reading dumped samples (JSON lines with all
  that a sample has: texts, tokens, mask, log-probs); peak memory against the frame's own size
- `.steps`: against pyarrow and pandas reading `metrics.jsonl`, and against pandas reading those dumps and grouping
  them by step
- a W&B offline file of 100 000 rows, against `wandb leet inspect --json`
- the report of 10 000 samples: seconds and MB
- `import analysis` against `import pandas`

A million dumped samples of 512 tokens are 14 GB: pandas reads those of `DUMPED` steps, and its seconds are scaled by
rows, as the printed line says. Baseline and candidate alternate, in fresh processes where the import counts; the
median is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from analysis import demo_data, load_run, load_wandb
from analysis.demo.run import Size
from analysis.demo.run import write_run as write_demo_run
from analysis.pages.html import browse
from analysis.reading.samples import SCALARS
from rltrain.run.layout import RunLayout
from rltrain.schema import read_table

GROUPS, GROUP_SIZE = 10, 10
SHORT, LONG = 32, 512  # tokens of a response
DUMPED = 100  # steps
WORDS = ["so", "the", "answer", "we", "carry", "add", "first", "then", "wait", "check", "let", "me", "think"]
WANDB_ROWS = 100_000
# Not ru_maxrss: a process inherits the one of the process that starts it.
PEAK = """
import sys
from analysis import load_run
import pyarrow.parquet
run, read = load_run(sys.argv[1]), sys.argv[2] == "read"
size = run.samples.memory_usage(deep=True).sum() if read else 0
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(size, int(peak.split()[1]) * 1024)
"""
WRITE_WANDB = """
import random, sys, wandb
run = wandb.init(project="p", id="abc", dir=sys.argv[1], mode="offline",
                 settings=wandb.Settings(console="off", silent=True))
for step in range(int(sys.argv[2])):
    run.log({"step": step, **{f"train/{i}": random.random() for i in range(10)}})
run.finish()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--long-steps", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--wandb-rows", type=int, default=WANDB_ROWS, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        imports()
        short = write_run(Path(name) / "short", args.steps, SHORT)
        long = write_run(Path(name) / "long", args.long_steps, LONG)
        steps(short, [samples(short, SHORT), samples(long, LONG)], args.steps * GROUPS * GROUP_SIZE)
        report(long)
        wandb_file(Path(name) / "wandb", args.wandb_rows)


def write_run(root: Path, steps: int, response: int, groups: int = GROUPS) -> RunLayout:
    """A run whose steps all hold the same samples but for their numbers, written as a run writes them."""
    demo, size = demo_data.demo_runs()[1], Size(groups=groups, group_size=GROUP_SIZE)
    source = RunLayout(write_demo_run(root.with_name(f"{root.name}-source"), demo, size))
    layout, base = RunLayout(root), with_responses(read_table(source.step_dir(5, 0)), response)

    def write_step(step: int) -> None:
        own = base.set_column(0, "step", pa.array([step] * len(base), pa.int32()))
        numbers = pa.array(range(step * len(base), (step + 1) * len(base)), pa.int64())
        own = own.set_column(own.column_names.index("index"), "index", numbers)
        layout.step_dir(step, 0).mkdir(parents=True)
        pq.write_table(own, layout.step_dir(step, 0) / "part-0.parquet", compression="zstd")

    with ThreadPoolExecutor() as threads:
        list(threads.map(write_step, range(steps)))
    rows = [json.loads(line) for line in source.metrics.read_text().splitlines()]  # of evaluations too
    lines = [json.dumps({**rows[step % len(rows)], "step": step}) + "\n" for step in range(steps)]
    layout.metrics.write_text("".join(lines))
    return layout


def with_responses(table: pa.Table, response: int) -> pa.Table:
    """The same samples with responses of so many tokens."""
    rng, rows = random.Random(0), len(table)
    words = [" ".join(rng.choices(WORDS, k=response * 3 // 4)) for _ in range(rows)]
    columns = {
        "response": words,
        "response_length": [response] * rows,
        "tokens": [[rng.randrange(150_000) for _ in range(response)] for _ in range(rows)],
        "loss_mask": [[1] * response] * rows,
        "rollout_log_probs": [[-rng.expovariate(2) for _ in range(response)] for _ in range(rows)],
    }
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


@dataclass(frozen=True)
class Dump:
    """What pandas takes to read some dumped samples, and to group them by step too."""

    response: int
    rows: int
    bytes: int
    read_seconds: float
    group_seconds: float

    def basis(self, rows: int) -> str:
        """What the seconds for so many rows are scaled from."""
        size = self.bytes * rows / self.rows / 1e9
        return f"{self.rows:,} samples scaled by rows to {rows:,}, which are {size:.1f} GB"


def samples(layout: RunLayout, response: int) -> Dump:
    paths = [str(path) for paths in layout.sample_files().values() for path in paths]
    raw = lambda: ds.dataset(paths, format="parquet").to_table(columns=SCALARS)  # noqa: E731
    rows = len(load_run(layout.root).samples)  # warms up
    ours, theirs = alternate(lambda: load_run(layout.root).samples, raw)
    dump = measure_dump(layout, response)
    json_seconds = dump.read_seconds * rows / dump.rows
    print(f"scalar frame, {rows:,} samples of {response} tokens in {len(paths):,} files: {ours:.2f} s")
    print(f"  {ours / theirs:.2f} x pyarrow reading the same columns raw ({theirs:.2f} s; aim <= 1.5)")
    print(f"  {json_seconds / ours:.1f} x as fast as pandas reading the samples as JSON lines (aim >= 20)")
    print(f"    ({json_seconds:.1f} s; {dump.basis(rows)})")
    (_, idle), (size, peak) = peak_memory(layout, "idle"), peak_memory(layout, "read")
    print(f"  peak memory {(peak - idle) / size:.2f} x the frame of {size / 1e6:.0f} MB (aim <= 3)")
    return dump


def measure_dump(layout: RunLayout, response: int) -> Dump:
    path = layout.root / "dump.jsonl"
    part = load_run(layout.root).read_samples("all", steps=layout.steps()[:DUMPED])
    part.dropna(axis="columns", how="all").to_json(path, orient="records", lines=True)
    read, group = alternate(lambda: pd.read_json(path, lines=True), lambda: mean_by_step(path))
    return Dump(response, len(part), path.stat().st_size, read, group)


def mean_by_step(dump: Path) -> pd.DataFrame:
    """What people do with dumped samples."""
    rows = pd.read_json(dump, lines=True)
    rows["truncated"] = rows["status"] == "truncated"
    return rows.groupby("step")[["reward", "response_length", "truncated"]].mean()


def peak_memory(layout: RunLayout, mode: str) -> tuple[int, int]:
    """Bytes of the frame, and the largest size that a process of its own has had."""
    command = [sys.executable, "-c", PEAK, str(layout.root), mode]
    size, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(size), int(peak)


def steps(layout: RunLayout, dumps: list[Dump], rows: int) -> None:
    read = lambda: load_run(layout.root).steps  # noqa: E731
    by_arrow, arrow = alternate(read, lambda: pa_json.read_json(layout.metrics), 15)
    by_pandas, pandas = alternate(read, lambda: pd.read_json(layout.metrics, lines=True), 15)
    ours = statistics.mean([by_arrow, by_pandas])
    print(f".steps, {len(read()):,} of them: {ours * 1000:.0f} ms")
    print(f"  {by_arrow / arrow:.2f} x pyarrow reading metrics.jsonl raw ({arrow * 1000:.0f} ms; aim <= 1.5)")
    print(f"  {pandas / by_pandas:.1f} x as fast as pandas reading metrics.jsonl ({pandas * 1000:.0f} ms)")
    for dump in dumps:
        seconds_all = dump.group_seconds * rows / dump.rows
        print(
            f"  {seconds_all / ours:,.0f} x as fast as pandas reading samples of {dump.response} tokens as JSON lines"
            f" and grouping them by step (aim >= 20)\n    ({seconds_all:.0f} s; {dump.basis(rows)})"
        )


def report(layout: RunLayout) -> None:
    run = load_run(layout.root)
    _ = run.samples, run.steps
    content = ""

    def write() -> None:
        nonlocal content
        content = browse(run, 10_000).content

    print(f"report of 10 000 samples: {seconds(write):.1f} s, {len(content) / 1e6:.1f} MB")


def wandb_file(directory: Path, rows: int) -> None:
    directory.mkdir()
    subprocess.run([sys.executable, "-c", WRITE_WANDB, directory, str(rows)], check=True, capture_output=True)
    path = next(directory.glob("wandb/offline-run-*/*.wandb"))
    leet = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]
    ours, theirs = alternate(
        lambda: load_wandb(path).steps, lambda: subprocess.run(leet, check=True, stdout=subprocess.DEVNULL)
    )
    print(f"W&B file of {rows:,} rows: {ours:.2f} s, {theirs / ours:.1f} x as fast as wandb leet (aim >= 5)")


def imports() -> None:
    command = [sys.executable, "-c"]
    ours, theirs = alternate(
        lambda: subprocess.run([*command, "import analysis"], check=True),
        lambda: subprocess.run([*command, "import pandas"], check=True),
        repeats=9,
    )
    print(f"import analysis: {ours:.2f} s, {ours / theirs:.2f} x import pandas (aim <= 1.15)")


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 3
) -> tuple[float, float]:
    """Median seconds of both, taken in turns."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
