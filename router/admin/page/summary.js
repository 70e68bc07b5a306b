/** What this router's requests do: counts, rates and latency. */

import { KeyedList, stamp } from "./dom.js";
import { count, duration, percent, rate } from "./format.js";

const LATENCIES = [
  ["time_to_first_token", "First token"],
  ["inter_token", "Between tokens"],
  ["end_to_end", "Whole request"],
];

const OBJECTIVES = {
  ttft: "the first token within",
  tpot: "on average a token every",
  itl: "no wait between tokens above",
  e2e: "the whole answer within",
};

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
    const window = `${Math.round(state.latency.window_s / 60)} minutes`;
    page.text("window", window);
    page.text("slo-window", window);
    this.#updateSlo(state.slo);
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

  #updateSlo(slo) {
    this.page.text("goodput", rate(slo.good_per_s));
    const share = slo.num_good / slo.num_counted;
    this.page.text("good-share", slo.num_counted ? percent(Math.floor(share * 100) / 100) : "–"); // 100 %: all
    const asked = Object.entries(slo.limits_s).map(([name, limit]) => `${OBJECTIVES[name]} ${duration(limit)}`);
    this.page.text("objectives", `Good: answered to the end${asked.length ? ", " : ""}${asked.join(", ")}.`);
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
