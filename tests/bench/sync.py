"""How long a sync of a long TASKS.md takes: the first one, one with nothing to do, one with edits.

python tests/bench/sync.py [ROWS]: on a server of its own, in this process.  A third of the rows
is done already; each depends on the one before.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import BINARIES, Server

import mosaic_queue as mq

HEAD = "| id | status | description | issue | agent | branch | depends_on | blocks | notes |\n"


def document(rows: int) -> str:
    lines = [HEAD, "|---|---|---|---|---|---|---|---|---|\n"]
    for at in range(rows):
        status = "done" if at < rows // 3 else "not-started"
        needs = f"T-{at - 1}" if at else "—"
        lines.append(
            f"| T-{at} | {status} | Trace the completion path -> part {at} | — | sonnet | fix/x "
            f"| {needs} | T-{at + 1} | of {rows} rows |\n"
        )
    lines[-1] = lines[-1].replace(f"T-{rows} ", "")
    return "".join(lines)


async def measured(server: Server, path: Path, rows: int) -> None:
    config = mq.Config(environ={}).set("redis.url", server.url, "bench")
    async with mq.Queue(config) as queue:

        async def timed(what: str) -> None:
            began, cpu = time.perf_counter(), time.process_time()
            report = await mq.sync_file(queue, path, "p")
            kinds = sorted({row["kind"] for row in report["rows"]})
            spent = time.perf_counter() - began
            cpu = time.process_time() - cpu
            found = f"{len(report['rows'])} {', '.join(kinds)}"
            print(f"{what:<34} {spent:6.2f} s, {cpu:5.2f} s of it here  {found}")

        await timed(f"first sync of {rows} rows")
        await timed("nothing to do")
        await timed("nothing to do, again")
        await queue.complete(f"T-{rows - 1}", project="p", force=True)
        await timed("one task completed")
        text = path.read_text()
        path.write_text(text.replace("part 1 ", "part one "))
        await timed("one description edited")
        path.write_text(path.read_text().replace("Trace", "Follow"))
        await timed("all descriptions edited")
        await timed("nothing to do")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    server = Server(str(BINARIES["valkey"]()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_STATE_HOME"] = folder
            path = Path(folder) / "TASKS.md"
            path.write_text(document(rows))
            asyncio.run(measured(server, path, rows))
    finally:
        server.close()


if __name__ == "__main__":
    main()
