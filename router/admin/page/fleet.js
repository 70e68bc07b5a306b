/** Pools and their workers as cards. */

import { KeyedList, stamp } from "./dom.js";
import { count, duration, percent, plural, rate } from "./format.js";

const POOL_NAMES = { prefill: "Prefill", decode: "Decode", unsplit: "Unsplit" };

export class Fleet {
  #states = new Map(); // worker id -> its last state

  /** @param {import("./dom.js").Fields} page */
  constructor(page) {
    this.page = page;
    this.pools = new KeyedList(document.getElementById("fleet"), (pool) => pool.role, () => new PoolView());
  }

  update(state) {
    this.pools.update(
      state.pools.map((pool) => ({
        ...pool,
        workers: state.workers.filter((worker) => worker.role === pool.role),
      })),
    );
    document.getElementById("no-workers").hidden = state.workers.length > 0;
    this.#announce(state.workers);
  }

  /** Tells screen readers who has changed its state, and nothing else. */
  #announce(workers) {
    const news = [];
    for (const { id, state } of workers) {
      const before = this.#states.get(id);
      if (before !== undefined && before !== state) news.push(`${id} is ${state}`);
    }
    for (const id of this.#states.keys()) {
      if (!workers.some((worker) => worker.id === id)) news.push(`${id} has left`);
    }
    this.#states = new Map(workers.map(({ id, state }) => [id, state]));
    if (news.length) this.page.text("announcement", news.join(", "));
  }
}

class PoolView {
  constructor() {
    Object.assign(this, stamp("pool"));
    this.cards = new KeyedList(this.fields.element("cards"), (worker) => worker.id, () => new WorkerCard());
  }

  update(pool) {
    const { fields } = this;
    fields.text("name", POOL_NAMES[pool.role] ?? pool.role);
    fields.text("size", `${pool.num_usable} of ${plural(pool.num_workers, "worker")} ready`);
    fields.text("summary", summary(pool));
    fields.attribute("cards", "aria-label", `${POOL_NAMES[pool.role] ?? pool.role} workers`);
    this.cards.update(pool.workers);
  }
}

function summary(pool) {
  const parts = [
    `${plural(pool.waiting_requests, "request")} (${plural(pool.waiting_tokens, "token")}) in queues`,
    `${plural(pool.running_sequences, "sequence")} in batches`,
    `KV ${percent(heldShare(pool.blocks))} held`,
  ];
  if (pool.role !== "prefill") parts.push(`${rate(pool.output_tokens_per_s)} output tokens/s`);
  return parts.join(" · ");
}

class WorkerCard {
  constructor() {
    Object.assign(this, stamp("worker"));
  }

  update(worker) {
    const { fields } = this;
    fields.text("id", worker.id);
    fields.text("state", worker.state);
    fields.attribute("state", "data-state", worker.state);
    fields.text("queue", queue(worker));
    fields.text("batch", batch(worker));
    fields.text("rate", rateOf(worker));
    const [paceName, pace] = paceOf(worker);
    fields.text("pace-name", paceName);
    fields.text("pace", pace);
    this.#updateBlocks(worker.blocks);
  }

  #updateBlocks(blocks) {
    const { fields } = this;
    fields.text("kv", blocks ? kvText(blocks) : "KV: not known");
    fields.attribute("blocks", "aria-label", blocks ? kvText(blocks) : "KV: not known");
    for (const kind of ["active", "reserved", "cached"]) {
      fields.property(kind, "--share", blocks ? share(blocks, blocks[kind]).toFixed(3) : "0");
    }
  }
}

function queue(worker) {
  const tokens = worker.waiting_tokens ? `, ${plural(worker.waiting_tokens, "token")}` : "";
  return plural(worker.waiting_requests, "request") + tokens;
}

function batch(worker) {
  const context = worker.context_tokens ? `, ${count(worker.context_tokens)} in context` : "";
  return plural(worker.running_sequences, "sequence") + context;
}

function rateOf(worker) {
  const steps = `${rate(worker.steps_per_s)} steps/s`;
  return worker.role === "prefill" ? steps : `${rate(worker.output_tokens_per_s)} tokens/s, ${steps}`;
}

function paceOf(worker) {
  const prefill = worker.prefill_tokens_per_s ? `${rate(worker.prefill_tokens_per_s)} tokens/s` : "–";
  if (worker.role === "prefill") return ["Last prompt step", prefill];
  return ["Last decode step", duration(worker.decode_step_s || null)];
}

function kvText(blocks) {
  const total = blocks.free + blocks.cached + blocks.reserved + blocks.active;
  return (
    `KV ${percent(heldShare(blocks))} held: ${count(blocks.active)} active, ${count(blocks.reserved)} reserved, ` +
    `${count(blocks.cached)} cached of ${plural(total, "block")}`
  );
}

function heldShare(blocks) {
  return share(blocks, blocks.active + blocks.reserved);
}

function share(blocks, part) {
  const total = blocks.free + blocks.cached + blocks.reserved + blocks.active;
  return total ? part / total : 0;
}
