// As drain_worker.py, for BullMQ on Node: node drain_worker.mjs fill N | drain CONCURRENCY
// It stands in a folder with BullMQ while it runs: Node looks for packages beside the file.
import { closeSync, openSync, writeSync } from "node:fs";
import { Queue, Worker } from "bullmq";

const [what, number] = [process.argv[2], Number(process.argv[3])];
const { hostname: host, port } = new URL(process.env.DRAIN_URL);
const connection = { host, port: Number(port) };
const file = openSync(process.env.DRAIN_COUNTS, "r+");
const slot = 8 * Number(process.env.DRAIN_SLOT);
const cell = Buffer.alloc(8);
let done = 0n;

console.log("ready");
process.stdin.once("data", async () => {
  if (what === "fill") {
    const queue = new Queue("drain", { connection });
    for (let at = 0; at < number; at += 200) {
      const rows = Array.from({ length: Math.min(200, number - at) }, () => ({ name: "noop", data: {} }));
      await queue.addBulk(rows);
    }
    closeSync(file);
    process.exit(0);
  }
  new Worker("drain", async () => {
    cell.writeBigInt64LE(++done);
    writeSync(file, cell, 0, 8, slot);
  }, { connection, concurrency: number });
});
