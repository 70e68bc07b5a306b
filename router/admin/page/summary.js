/** What this router's requests do: counts, rates and latency. */

import { KeyedList, stamp } from "./dom.js";
import { count, duration, rate } from "./format.js";

const LATENCIES = [
  ["time_to_first_token", "First token"],
  ["inter_token", "Between tokens"],
  ["end_to_end", "Whole request"],
];

export class Summary {
  /** @param {import("./dom.js").Fields} page */
  constructor(page) {
    this.page = page;
    this.rows = new KeyedList(document.getElementById("latency"), (row) => row.kind, () => new LatencyRow());
  }

  update(state) {
    const { page } = this;
    page.text("model", state.model);
    page.text("router", state.router);
    page.text("readiness", state.ready ? (state.reason === "ready" ? "ready" : "degraded") : "not ready");
    page.attribute("readiness", "data-state", state.ready && state.reason === "ready" ? "ready" : "degraded");
    page.shown("readiness", true);
    page.text("reason", state.reason);
    page.shown("reason", state.reason !== "ready");
    this.#updateRequests(state.requests);
    page.text("window", `${Math.round(state.latency.window_s / 60)} minutes`);
    this.rows.update(LATENCIES.map(([kind, name]) => ({ kind, name, ...state.latency[kind] })));
  }

  #updateRequests(requests) {
    const waiting = requests.waiting ? ` (${count(requests.waiting_tokens)} tokens)` : "";
    this.page.text("running", count(requests.running));
    this.page.text("waiting", count(requests.waiting) + waiting);
    this.page.text("ended", rate(requests.ended_per_s));
    this.page.text("prompt-tokens", rate(requests.prompt_tokens_per_s));
    this.page.text("output-tokens", rate(requests.output_tokens_per_s));
  }
}

class LatencyRow {
  constructor() {
    Object.assign(this, stamp("latency-row"));
  }

  update(row) {
    this.fields.text("name", row.name);
    this.fields.text("p50", duration(row.p50_s));
    this.fields.text("p90", duration(row.p90_s));
    this.fields.text("p99", duration(row.p99_s));
    this.fields.text("count", count(row.count));
  }
}
