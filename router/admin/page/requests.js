/** The newest requests of this router: what became of them, and when what happened. */

import { ask } from "./access.js";
import { KeyedList, stamp } from "./dom.js";
import { bytes, duration, plural } from "./format.js";
import { stagesOf } from "./stages.js";
import { Timeline, Waterfall } from "./waterfall.js";

const NUM_SHOWN = 20;

export class Requests {
  #isAsking = false;
  #wasBusy = true; // whether something has changed since the list was fetched

  constructor() {
    this.list = new KeyedList(
      document.getElementById("recent-requests"),
      ({ report }) => report.request_id,
      () => new RequestRow(),
    );
    this.none = document.getElementById("no-requests");
  }

  /** Fetches the list again, unless this state and the one before tell that nothing has happened. */
  update({ requests }) {
    const isBusy = requests.running > 0 || requests.ended_per_s > 0;
    if (isBusy || this.#wasBusy) this.#fetch();
    this.#wasBusy = isBusy;
  }

  async #fetch() {
    if (this.#isAsking) return;
    this.#isAsking = true;
    try {
      const response = await ask(`requests?limit=${NUM_SHOWN}`);
      if (!response.ok) return;
      const { now, requests } = await response.json();
      this.none.hidden = requests.length > 0;
      this.list.update(requests.map((report) => ({ report, now })));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a TypeError: the server is gone, which main.js tells
    } finally {
      this.#isAsking = false;
    }
  }
}

class RequestRow {
  constructor() {
    Object.assign(this, stamp("request"));
    this.timeline = new Timeline(this.fields.element("timeline"));
    this.waterfall = new Waterfall(this.fields.element("report"), "When what happened");
    this.attempts = new KeyedList(
      this.fields.element("attempts"),
      (attempt) => attempt.number,
      () => new AttemptRow(),
    );
  }

  update({ report, now }) {
    const { fields } = this;
    const ended_s = report.ended_s ?? now - report.arrived_at;
    fields.text("time", timeOf(report.arrived_at));
    fields.text("outcome", report.outcome ?? report.state);
    fields.attribute("outcome", "data-outcome", kindOf(report));
    fields.text("size", sizeOf(report));
    fields.text("first", `first token ${duration(report.first_token_s)}`);
    fields.text("total", report.outcome === null ? "runs" : duration(ended_s));
    fields.text("id", report.request_id);
    fields.text("message", report.message ?? "");
    fields.shown("message", report.message !== null);
    const stages = stagesOf(report, ended_s);
    this.timeline.update(stages);
    this.waterfall.update(stages);
    this.attempts.update(report.attempts);
  }
}

class AttemptRow {
  constructor() {
    Object.assign(this, stamp("attempt"));
  }

  update(attempt) {
    this.fields.text("text", describe(attempt));
  }
}

/** By the 24-hour clock, so that it takes the same room everywhere. */
function timeOf(unix_s) {
  return new Date(unix_s * 1000).toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" });
}

function sizeOf(report) {
  if (report.prompt_tokens === null) return "refused";
  return `${plural(report.prompt_tokens, "prompt token")}, ${report.output_tokens} out`;
}

function kindOf(report) {
  if (report.outcome === null || report.outcome === "cancelled") return report.outcome ?? "runs";
  return report.message === null ? "fine" : "failed";
}

/** One attempt in a line: who served it, what was cached where, and how its KV travelled. */
function describe(attempt) {
  const parts = [`Attempt ${attempt.number}: `];
  const { prefill_worker: prefill, decode_worker: decode, cached_tokens: cached, transfer } = attempt;
  parts.push(prefill ? `prompt at ${prefill}, answer at ${decode}` : `all at ${decode}`);
  if (cached && cached.prefill + cached.decode) {
    parts.push(`; cached ${plural(cached.prefill, "token")} at the prefill worker, ${cached.decode} at the decode worker`);
  }
  if (transfer) parts.push(`; KV by ${transfer.transport}, ${bytes(transfer.bytes)}`);
  if (attempt.message) parts.push(`; ended: ${attempt.message}`);
  return parts.join("");
}
